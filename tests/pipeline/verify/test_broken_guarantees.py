"""Each guarantee broken on purpose: verify-sync notices, and names what is broken."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.dropout import context
from pipeline.dropout.masks import ActiveMasks
from pipeline.errors import MasklockError
from pipeline.verify import stage, worker
from pipeline.verify.compare import compare
from pipeline.verify.layouts import parse_layouts

RATES = {"embedding": 0.1, "hidden": 0.2, "attention": 0.2, "head": 0.3}


@pytest.fixture
def outcome_of(run_config, tmp_path):
    """Runs a layout of one process, in this one, with something broken."""
    config = run_config(dropout=RATES)
    expected = stage.reference(config, tmp_path)

    def run(name, also=None):
        (layout,) = parse_layouts(name)
        folder = tmp_path / name.replace(":", "-")
        folder.mkdir()
        worker.run(stage.short_run(config, layout, folder), folder, layout, also=also)
        return compare(name, stage.gather(folder), expected, 0.0)

    return run


@pytest.mark.parametrize("name", ["single", "accumulate:4", "checkpointing", "padding"])
def test_nothing_broken_is_equal(outcome_of, name):
    outcome = outcome_of(name)
    assert outcome.equal, outcome
    assert outcome.gradient_difference < 1e-5


def test_native_dropout_at_a_planned_site_is_named(outcome_of):
    def leave_native(trainer):
        site = trainer.model.bert.embeddings.dropout
        site.__class__ = torch.nn.Dropout

    with pytest.raises(MasklockError, match=r"bert\.embeddings\.dropout#0"):
        outcome_of("single", leave_native)


def test_dropout_beside_the_plan_is_seen_in_the_gradients(outcome_of):
    def add_native(trainer):
        def drop(module, args, output):
            return output * torch.empty_like(output).bernoulli_(0.5)

        trainer.model.classifier.register_forward_hook(drop)

    outcome = outcome_of("single", add_native)
    assert not any("masks differ" in line for line in outcome.differences)
    assert any("gradients differ" in line and "step 0" in line for line in outcome.differences)


def test_the_row_number_in_place_of_the_sample_id_is_another_order(outcome_of):
    def number_rows(trainer):
        collate = trainer.data_collator

        def numbered(rows):
            return collate(rows) | {"sample_id": torch.arange(len(rows))}

        trainer.data_collator = numbered

    said = outcome_of("single", number_rows).differences
    assert said[0].startswith("step 0 visits other samples")
    assert "it was not drawn" in said[1]


def test_the_models_own_loss_is_four_times_too_large_under_accumulation(outcome_of):
    def own_loss(trainer):
        trainer.compute_loss_func, trainer.model_accepts_loss_kwargs = None, True

    outcome = outcome_of("accumulate:4", own_loss)
    assert outcome.gradient_difference == pytest.approx(3.0, rel=1e-3)
    assert any(line.startswith("the loss of step 0 is") for line in outcome.differences)
    assert not any("masks" in line for line in outcome.differences)


def test_calls_that_count_on_in_a_recompute_are_another_mask(outcome_of, monkeypatch):
    claim = context.KeyedDropout._claim

    def counting_on(self, door, site, rate):
        found = claim(self, door, site, rate)
        if found is None or not found[1].recomputing:
            return found
        return *found[:2], found[2] + 1

    monkeypatch.setattr(context.KeyedDropout, "_claim", counting_on)
    said = outcome_of("checkpointing").differences[0]
    assert said.startswith("a recompute drew another mask: step 0, bert.encoder.layer.")


def test_a_counter_that_is_not_set_back_stops_a_recompute_by_the_sites_name(
    outcome_of, monkeypatch
):
    def shared(self):
        return replace(self, recomputing=True)

    monkeypatch.setattr(ActiveMasks, "snapshot", shared)
    with pytest.raises(MasklockError, match=r"bert\.encoder\.layer\.\d.*#1"):
        outcome_of("checkpointing")


def test_a_seed_that_depends_on_the_rank_is_named_by_two_processes(run_config, monkeypatch):
    monkeypatch.setattr(stage, "WORKER", "broken_worker")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    config, said = run_config(dropout=RATES), []
    (outcome,) = stage.verify_sync(config, parse_layouts("ddp:2"), said.append)
    assert outcome.state == "differs"
    assert "96 masks differ; step 0, site bert.embeddings.dropout#0" in outcome.differences[0]


def test_a_layout_that_cannot_start_is_reported_and_the_others_run(run_config, monkeypatch):
    monkeypatch.setattr(stage, "WORKER", "no_such_worker")
    outcomes = stage.verify_sync(run_config(), parse_layouts("single,padding"), lambda line: None)
    assert [outcome.state for outcome in outcomes] == ["failed", "failed"]
    assert "no_such_worker" in outcomes[0].differences[0]


def test_a_layout_that_hangs_is_ended_with_its_last_lines(monkeypatch):
    monkeypatch.setattr(stage, "START_SECONDS", 1)
    script = "import time; print('waiting', flush=True); time.sleep(60)"
    with pytest.raises(stage.LayoutFailed, match="no end within 1 s"):
        stage._start([stage.sys.executable, "-c", script], 0)
