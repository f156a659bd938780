"""What a probe reads of a mask: a sample's own tokens, whatever stands around them."""

import torch

from pipeline.dropout.context import KeyedDropout
from pipeline.model import build_model, plan_for
from pipeline.verify.probe import Probe, samples_in


def draws_of(model, plan, ids, mask, rows):
    """Digests by site and sample of one forward pass."""
    keyed, probe = KeyedDropout(model.train(), plan, seed=3), Probe()
    keyed.observer = probe.observe
    with keyed.context(purpose="train", index=4, row_ids=torch.tensor(rows)):
        model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))
    keyed.release()
    assert probe.changed == []
    return probe.masks["4"]


def small_model(run_config):
    config = run_config(dropout={"hidden": 0.2, "attention": 0.2, "head": 0.3})
    plan = plan_for(config, ("a", "b"))
    return build_model(config, ("a", "b"), plan), plan


def test_padding_and_company_leave_no_trace_in_rows_and_attention(run_config):
    model, plan = small_model(run_config)
    alone = draws_of(model, plan, [[5, 6, 7]], [[1, 1, 1]], [17])
    ids = [[9, 9, 9, 9, 9, 9], [0, 0, 5, 6, 7, 0]]
    among = draws_of(model, plan, ids, [[1] * 6, [0, 0, 1, 1, 1, 0]], [4, 17])
    assert any("attention" in site for site in alone)
    assert len(alone) > 5
    assert {site: seen["17"] for site, seen in among.items()} == {
        site: seen["17"] for site, seen in alone.items()
    }
    assert all(seen["4"] != seen["17"] for seen in among.values())


def test_a_packed_row_holds_several_samples_each_with_its_own_tokens():
    row_ids = torch.tensor([[3, 3, 8, 8, 8, -1]])
    attended = torch.tensor([[1, 1, 1, 1, 1, 0]])
    found = {sample: own.int().tolist() for _, sample, own in samples_in(row_ids, attended)}
    assert found == {3: [1, 1, 0, 0, 0, 0], 8: [0, 0, 1, 1, 1, 0]}


def test_a_draw_of_the_same_coordinates_with_other_bits_is_kept_as_changed(run_config):
    model, plan = small_model(run_config)
    keyed, probe = KeyedDropout(model.train(), plan, seed=3), Probe()
    keyed.observer = probe.observe
    for seed in (3, 4):
        keyed.seed = seed
        with keyed.context(purpose="train", index=0, row_ids=torch.tensor([6])):
            model(input_ids=torch.tensor([[5, 6, 7]]))
    keyed.release()
    assert any("sample 6" in line and "step 0" in line for line in probe.changed)
