"""The passes equal a plain loop over single rows, in any batch; only planned sites draw."""

import logging
from dataclasses import fields, is_dataclass

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import DropoutError, LeakError
from pipeline.evaluation.forward import bare_model, logits_of
from pipeline.evaluation.mc_dropout import MonteCarlo

HEAD_ONLY = {"embedding": 0.0, "attention": 0.0, "hidden": 0.0, "head": 0.3}
INSERTED = {"attention": 0.2, "insert": {"embedding": 0.1, "hidden": 0.2}}
LORA = {"r": 4, "lora_alpha": 8}
MODELS = {
    "classifier": {"kind": "bert"},
    "head only": {"kind": "bert", "dropout": HEAD_ONLY},
    "classifier with LoRA": {
        "kind": "bert",
        "dropout": {"hidden": 0.1, "head": 0.2, "adapter": 0.3},
        "peft": LORA | {"target_modules": ["query"], "modules_to_save": ["classifier"]},
    },
    "language model": {"kind": "llama", "dropout": INSERTED},
    "language model with LoRA": {
        "kind": "llama",
        "dropout": {"adapter": 0.3, "insert": {"hidden": 0.1}},
        "peft": LORA | {"target_modules": ["q_proj", "lm_head"]},
    },
}


@pytest.fixture(params=MODELS)
def keyed(request, bind):
    return bind(**MODELS[request.param])


def assert_equal(found, expected):
    """All figures of two predictions, nested ones too, to 1e-6."""
    assert is_dataclass(found)
    for field in fields(found):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(one, Tensor):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
        else:
            assert_equal(one, other)


def assert_equal_rows(found, expected, back):
    for field in fields(expected):
        moved = getattr(found, field.name)[back]
        torch.testing.assert_close(moved, getattr(expected, field.name), atol=1e-6, rtol=1e-6)


def single(row):
    """One row as a batch of its own, without padding."""
    ids = torch.tensor([row["input_ids"]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def plain_passes(keyed, row, num_passes):
    passes = []
    for index in range(num_passes):
        ids = torch.tensor([row["sample_id"]])
        with torch.no_grad(), keyed.context(purpose="mc", index=index, row_ids=ids):
            passes.append(keyed.model(**single(row)).logits[0].double())
    return torch.stack(passes)


# -- the same numbers everywhere -----------------------------------------------------------------


def test_no_number_depends_on_the_batch_or_the_order_of_rows(keyed, make_predictor, rows):
    expected = make_predictor(keyed, batch_size=1).predict(rows)
    for batch_size in (7, 32):
        assert_equal(make_predictor(keyed, batch_size).predict(rows), expected)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = rows.select(order)
    counts_positions_by_mask = hasattr(bare_model(keyed.model), "lm_head")  # BERT pads right
    found = make_predictor(keyed, 7, left=counts_positions_by_mask).predict(shuffled)
    assert_equal(found, make_predictor(keyed, 1).predict(shuffled))
    back = torch.tensor(order).argsort()
    assert_equal_rows(found.monte_carlo, expected.monte_carlo, back)
    assert found.sample_ids.tolist() == [rows[place]["sample_id"] for place in order]


def test_predictions_equal_a_plain_loop_over_rows_and_passes(keyed, make_predictor, rows):
    found = make_predictor(keyed, num_passes=3).predict(rows)
    assert found.sample_ids.tolist() == rows["sample_id"][:]
    for place, row in enumerate(rows):
        mean = plain_passes(keyed, row, 3).softmax(-1).mean(0)
        if hasattr(found, "labels"):
            expected, result = mean, found.monte_carlo.mean_probabilities[place]
        else:
            target = torch.tensor(row["input_ids"])[1:, None]
            expected = mean[:-1].gather(1, target).log().mean()
            result = found.monte_carlo.log_probability[place]
        torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-6)


def test_figures_of_tokens_are_in_the_order_of_the_rows(bind, make_predictor, rows):
    keyed = bind("llama", dropout=INSERTED)
    tokens = make_predictor(keyed, 4).predict(rows).plain_tokens
    counts = [len(row["input_ids"]) - 1 for row in rows]
    assert tokens.row.tolist() == [row for row, count in enumerate(counts) for _ in range(count)]
    expected = []
    for row in rows:
        with torch.no_grad():
            log = keyed.model(**single(row)).logits[0, :-1].double().log_softmax(-1)
        expected += log.gather(1, torch.tensor(row["input_ids"])[1:, None]).flatten().tolist()
    assert tokens.log_probability.tolist() == pytest.approx(expected, abs=1e-6)


def test_more_passes_begin_with_the_same_passes(keyed, make_predictor, rows):
    inputs, ids = single(rows[0]), torch.tensor([rows[0]["sample_id"]])
    few = list(MonteCarlo(keyed, 3).passes(inputs, ids))
    more = list(MonteCarlo(keyed, 8).passes(inputs, ids))
    torch.testing.assert_close(torch.stack(more[:3]), torch.stack(few), atol=1e-6, rtol=0)
    assert len(more) == 8
    assert len({tuple(one.flatten().tolist()) for one in more}) == 8


# -- head only -----------------------------------------------------------------------------------


def runs_of(body):
    """Counts the forwards of a module, which a fixed answer does not call."""
    counted, forward = [], body.forward

    class Counting(type(body)):
        def forward(self, *args, **kwargs):
            counted.append(1)
            return super().forward(*args, **kwargs)

    body.__class__ = Counting
    assert forward.__self__ is body
    return counted


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "bert", "dropout": HEAD_ONLY},
        {
            "kind": "llama",
            "dropout": {"adapter": 0.3},
            "peft": LORA | {"target_modules": ["lm_head"]},
        },
    ],
    ids=["classifier", "language model"],
)
def test_head_only_passes_equal_full_ones_and_run_the_body_once_a_batch(
    bind, make_predictor, rows, options
):
    keyed = bind(**options)
    full, quick = make_predictor(keyed, 5, 6), make_predictor(keyed, 5, 6)
    body = quick.monte_carlo.body
    full.monte_carlo.body = None
    expected = full.predict(rows)
    counted = runs_of(body)
    assert_equal(quick.predict(rows), expected)
    assert len(counted) == 3 + 1  # three batches, and the audit


def test_stacks_of_passes_stay_small(bind, make_predictor, rows, monkeypatch):
    keyed = bind(dropout=HEAD_ONLY)
    whole = make_predictor(keyed, 5, 6).predict(rows)
    monkeypatch.setattr("pipeline.evaluation.mc_dropout._STACK_BYTES", 5000)
    widths = []
    keyed.model.classifier.register_forward_pre_hook(lambda _, args: widths.append(len(args[0])))
    assert_equal(make_predictor(keyed, 5, 6).predict(rows), whole)
    assert max(widths) < 6 * 5


# -- only planned sites --------------------------------------------------------------------------


def test_without_a_live_site_one_pass_is_run_and_it_is_the_plain_one(bind, make_predictor, rows):
    keyed = bind(dropout=dict.fromkeys(("embedding", "attention", "hidden", "head"), 0.0))
    assert MonteCarlo(keyed, 3).num_passes == 1
    found = make_predictor(keyed, num_passes=3).predict(rows)
    assert_equal(found.monte_carlo, found.plain)


def test_every_module_stays_in_evaluation_mode(bind, make_predictor, rows):
    keyed = bind()
    norm = nn.BatchNorm1d(16).double()
    keyed.model.classifier = nn.Sequential(norm, keyed.model.classifier)
    trained = []
    for module in keyed.model.modules():
        module.register_forward_hook(lambda module, args, output: trained.append(module.training))
    make_predictor(keyed.model.train() and keyed).predict(rows)
    assert trained
    assert not any(trained)
    assert norm.num_batches_tracked == 0


class Noise(nn.Module):
    def forward(self, x):
        return torch.native_dropout(x, 0.5, True)[0]


def test_dropout_that_nobody_planned_is_found(bind, make_predictor, rows, caplog):
    keyed = bind()
    keyed.model.classifier = nn.Sequential(Noise(), keyed.model.classifier)
    with pytest.raises(LeakError, match=r"native_dropout.*dropout\.strict"):
        make_predictor(keyed).predict(rows)
    with caplog.at_level(logging.WARNING):
        make_predictor(keyed, strict=False).predict(rows)
    assert "cannot be replayed" in caplog.text


def test_a_planned_site_that_never_draws_is_an_error(bind, rows):
    keyed = bind()
    keyed.model.classifier.forward = lambda x: x[:, :3]
    keyed.model.dropout.forward = lambda x: x
    with pytest.raises(DropoutError, match="drew nothing in evaluation mode: dropout#0"):
        next(MonteCarlo(keyed, 2).passes(single(rows[0]), torch.tensor([1])))


def test_no_pass_keeps_keys_and_values(bind, rows):
    keyed, kept = bind("llama", dropout=INSERTED), []
    keyed.model.model.register_forward_hook(lambda _, args, output: kept.append(output))
    list(MonteCarlo(keyed, 2).passes(single(rows[0]), torch.tensor([1])))
    logits_of(keyed.model, single(rows[0]))
    assert [output.past_key_values for output in kept] == [None] * 4
