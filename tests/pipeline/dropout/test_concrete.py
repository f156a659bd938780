"""Learned rates: the relaxed mask, the regulariser, where they can be, hard masks afterwards."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.config.dropout import ConcreteConfig
from pipeline.dropout.concrete import LearnedRates, learned_rates_of
from pipeline.dropout.key import derive_key
from pipeline.dropout.lookup import mask_of_run
from pipeline.dropout.philox import philox4x32_10
from pipeline.dropout.sites import Site
from pipeline.errors import DropoutError, RunFolderError
from pipeline.model import plan_for
from pipeline.records import RunFolder, write_json

LEARNED = {"rate": 0.2, "learned": True}


def site(rate=0.2, **changes) -> Site:
    values = {"site": "drop", "call": 0, "door": "module", "role": "hidden", "variant": "element"}
    values |= {"rate": rate, "in_force": True, "reason": "", "layout": "sample-first"}
    return Site(**values | {"shape": (3, 20), "learned": True, "linears": ("next",)} | changes)


def lanes_by_hand(key: int, sample: int, position: int, width: int) -> np.ndarray:
    counters = [[block, position, sample, 0] for block in range(-(-width // 8))]
    words = philox4x32_10(key, np.array(counters, dtype=np.uint32))
    return np.stack([words & 0xFFFF, words >> 16], -1).reshape(-1)[:width]


def test_the_relaxed_mask_follows_the_formula_and_so_does_its_gradient():
    rates, x = LearnedRates([site()], ConcreteConfig()), torch.randn(2, 3, 20).double()
    rates.double()
    per_row = [torch.tensor([[77]]).expand(2, 3), torch.tensor([[4], [9]]).expand(2, 3)]
    per_row.append(torch.arange(3).expand(2, 3))
    out = rates.relaxed(0, x, per_row, 1)
    logit = rates.logits.detach().clone().requires_grad_()
    p = torch.exp(logit) / (1 + torch.exp(logit))
    lanes = [[lanes_by_hand(77, s, at, 20) for at in range(3)] for s in (4, 9)]
    u = (torch.from_numpy(np.array(lanes)).double() + 0.5) / 65536
    odds = torch.log(p / (1 - p)) - torch.log(u / (1 - u))
    wanted = x * (1 - 1 / (1 + torch.exp(-odds / 0.1))) / (1 - p)
    torch.testing.assert_close(out, wanted)
    out.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(rates.logits.grad, logit.grad)


def test_the_regulariser_is_that_of_the_paper():
    model = nn.ModuleDict({"next": nn.Linear(20, 5), "other": nn.Linear(20, 5)})
    rates = LearnedRates([site(0.3)], ConcreteConfig(length_scale=0.7))
    p, weights = 0.3, float(model["next"].weight.detach().square().sum())
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    wanted = 0.49 / 2 * weights / (1 - p) - 20 * entropy
    assert rates.regulariser(model).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("model_type", "dropout", "linears"),
    [
        (
            "bert",
            {"embedding": LEARNED},
            [[f"bert.encoder.layer.0.attention.self.{n}" for n in ("query", "key", "value")]],
        ),
        (
            "bert",
            {"hidden": LEARNED},
            [
                ["bert.encoder.layer.0.attention.output.dense"],
                ["bert.encoder.layer.0.output.dense"],
            ],
        ),
        ("bert", {"head": LEARNED}, [["classifier"]]),
        (
            "llama",
            {"insert": {"hidden": LEARNED}},
            [["model.layers.0.self_attn.o_proj"], ["model.layers.0.mlp.down_proj"]],
        ),
        (
            "gpt2",
            {"hidden": LEARNED},
            [["transformer.h.0.attn.c_proj"], ["transformer.h.0.mlp.c_proj"]],
        ),
    ],
)
def test_the_linear_layers_next_to_a_site_are_found(config_of, model_type, dropout, linears):
    plan = plan_for(config_of(model_type, dropout))
    assert [list(s.linears) for s in plan.sites if s.learned] == linears


@pytest.mark.parametrize(
    ("model_type", "dropout", "message"),
    [
        ("llama", {"insert": {"embedding": LEARNED}}, r"model\.embed_tokens#0 cannot learn .* no"),
        ("bert", {"attention": LEARNED}, r"dropout\.attention asks for learned"),
        ("bert", {"head": LEARNED | {"variant": "token"}}, r"site dropout#0 \(variant token\)"),
    ],
)
def test_a_site_that_cannot_learn_is_an_error_by_name(config_of, model_type, dropout, message):
    with pytest.raises(DropoutError, match=message):
        plan_for(config_of(model_type, dropout))


@pytest.fixture
def bound(bind):
    return bind("bert", {"hidden": LEARNED, "embedding": 0, "attention": 0, "head": 0})


def hidden(bound, purpose: str, rows: list[int], **batch) -> torch.Tensor:
    seen = []
    module = bound.model.bert.encoder.layer[0].output.dropout
    handle = module.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    ids = torch.tensor(rows)
    with torch.no_grad(), bound.keyed.context(purpose=purpose, index=3, row_ids=ids):
        bound.model.eval()(**batch)
    handle.remove()
    return seen[0][1] / seen[0][0]


def test_a_relaxed_mask_is_locked_to_the_sample(bound, tokens):
    batch = tokens(3)
    together = hidden(bound, "train", [5, 6, 7], **batch)
    alone = hidden(bound, "train", [6], **{name: rows[1:2] for name, rows in batch.items()})
    torch.testing.assert_close(together[1:2], alone)


def test_a_cold_relaxed_mask_is_the_hard_mask(bound, tokens):
    rates = learned_rates_of(bound.model)
    rates.settings = ConcreteConfig(temperature=1e-6)
    relaxed = hidden(bound, "train", [5, 6, 7], **tokens(3))
    key = derive_key(1234567, "train", 3, "element", "bert.encoder.layer.0.output.dropout", 0)
    lanes = [[lanes_by_hand(key, row, at, 24) for at in range(7)] for row in (5, 6, 7)]
    keep = torch.from_numpy(np.array(lanes) >= round(65536 * 0.2))
    torch.testing.assert_close(relaxed, keep / 0.8, atol=1e-4, rtol=1e-4)


def test_passes_draw_hard_masks_at_the_learned_rate(bound, tokens):
    learned_rates_of(bound.model).logits.data.fill_(math.log(0.6 / 0.4))
    kept = hidden(bound, "mc", list(range(40)), **tokens(40))
    values = kept.unique()
    assert (values[values != 0] - 2.5).abs().max() < 1e-4
    assert float((kept == 0).float().mean()) == pytest.approx(0.6, abs=4 * 0.49 / 6720**0.5)


def test_rates_are_saved_beside_the_weights_and_only_there(bound, tmp_path):
    rates = learned_rates_of(bound.model)
    rates.logits.data.fill_(0.5)
    rates.save(tmp_path)
    bound.model.save_pretrained(tmp_path / "model")
    names = {f.name for f in (tmp_path / "model").iterdir()}
    from safetensors.torch import load_file

    assert "model.safetensors" in names
    assert not [n for n in load_file(tmp_path / "model/model.safetensors") if "learned" in n]
    rates.logits.data.zero_()
    rates.load(tmp_path)
    assert rates.logits.tolist() == [0.5, 0.5]


def test_rates_that_are_missing_or_of_other_sites_are_an_error(bound, tmp_path):
    with pytest.raises(RunFolderError, match="cannot be read"):
        learned_rates_of(bound.model).load(tmp_path)
    LearnedRates([site()], ConcreteConfig()).save(tmp_path)
    with pytest.raises(RunFolderError, match="rates of other sites"):
        learned_rates_of(bound.model).load(tmp_path)


def test_looking_up_a_learned_mask_needs_a_pass_and_reads_the_learned_rate(bound, tmp_path):
    run = RunFolder(tmp_path)
    run.model.mkdir()
    write_json(run.plan, bound.plan.to_json())
    learned_rates_of(bound.model).logits.data.fill_(math.log(0.6 / 0.4))
    learned_rates_of(bound.model).save(run.model)
    name = "bert.encoder.layer.0.output.dropout"
    assert mask_of_run(run, 1, 0, name, 5, "mc")["rate"] == pytest.approx(0.6)
    with pytest.raises(DropoutError, match="relaxed"):
        mask_of_run(run, 1, 0, name, 5, "train")
