"""The state machine of retraining, from trigger to promotion, rejection, rollback and failure."""

import json
from pathlib import Path

import pytest
from retraining_doubles import samples

from launch.retrain.evidence import read_windows
from launch.retrain.store import Store
from launch.retrain.tick import interfere, reasons, tick
from pipeline.errors import BusyError, ConfigError, RegistryError


def run(world, **options) -> int:
    return tick(world.plan(), now=world.now, starter=world.starter, **options)


def past(world):
    store = Store(world.plan().folder / "state.sqlite", world.now)
    try:
        return store.retrainings()
    finally:
        store.close()


def drift(world, severity="warning") -> None:
    for _ in range(2):
        world.add_window(world.champion_run(), severity)


def test_nothing_to_do_starts_nothing(world):
    assert run(world) == 0
    assert past(world) == []
    assert world.stages() == []


def test_drift_trains_a_better_model_and_promotes_it(world):
    before = world.registry.aliases().champion
    drift(world)
    assert run(world) == 0
    (one,) = past(world)
    after = world.registry.aliases()
    assert (one.state, after.champion, after.previous) == ("promoted", one.facts["version"], before)
    assert [line.split()[0] for line in world.stages()] == ["rows", "train", "evaluate", "evaluate"]
    assert [window["severity"] for window in one.evidence["drift"]["windows"]] == ["warning"] * 2


def test_the_same_windows_retrain_once(world):
    drift(world)
    run(world)
    world.wait(days=30)
    assert run(world) == 0
    assert len(past(world)) == 1


def test_a_worse_model_is_rejected_with_the_reason(world):
    before = world.registry.aliases().champion
    world.next_model_is(0.3)
    drift(world)
    assert run(world) == 0
    (one,) = past(world)
    assert one.state == "rejected"
    assert "accuracy 0.6500 -> 0.2167" in one.reason
    assert "may be worse by more than 0.05" in one.reason
    after = world.registry.aliases()
    assert (after.champion, after.challenger) == (before, None)


def test_a_metric_that_is_missing_rejects(world):
    world.policy["gate"]["metrics"]["nll"] = {"margin": 1.0}
    drift(world)
    run(world)
    assert past(world)[0].state == "rejected"
    assert "nll is missing: the first run has no column" in past(world)[0].reason


def test_runs_that_cannot_be_compared_reject_with_the_reason(world, monkeypatch):
    def other_texts(test, accuracy):
        found = samples(test, accuracy)
        texts = [f"{text} {accuracy}" for text in found["text"].to_pylist()]
        return found.set_column(2, "text", [texts])

    monkeypatch.setattr("retraining_doubles.samples", other_texts)
    drift(world)
    assert run(world) == 0
    assert past(world)[0].state == "rejected"
    assert "60 of 60 samples have another text" in past(world)[0].reason


def test_a_tokenizer_that_would_be_trained_is_the_champions(world):
    champion = world.registry.get("champion").folder
    drift(world)
    run(world)
    config = world.plan().folder / f"0001-{past(world)[0].key[:8]}" / "config.yaml"
    tokenizer = json.loads(config.read_text())["model"]["tokenizer_name_or_path"]
    assert tokenizer == str(champion / "model")


def test_bad_windows_after_a_promotion_roll_it_back(world):
    before = world.registry.aliases().champion
    drift(world)
    run(world)
    assert world.registry.aliases().champion != before
    drift(world, "critical")
    assert run(world) == 0
    (one,) = past(world)
    assert (one.state, world.registry.aliases().champion) == ("rolled back", before)
    assert "2 of its first windows raised a critical alert" in one.reason


def test_quiet_windows_end_the_watch(world):
    drift(world)
    run(world)
    for _ in range(3):
        world.add_window(world.champion_run())
    run(world)
    drift(world, "critical")
    world.wait(days=2)
    world.next_model_is(0.9)
    run(world)
    assert [one.state for one in past(world)] == ["promoted", "promoted"]


def test_nothing_starts_while_a_promotion_is_watched_or_cooling_down(world):
    world.policy["triggers"] = {"schedule": {"every": "1h"}}
    world.wait(hours=2)
    run(world)
    world.wait(hours=2)
    run(world)
    assert len(past(world)) == 1, "watched"
    world.wait(days=20)
    run(world)
    assert len(past(world)) == 2, "one turn of the 240 that were missed is caught up on"


def test_a_failure_is_tried_again_later_and_given_up_in_the_end(world):
    drift(world)
    world.codes = [0, 1]
    assert run(world) == 75
    assert run(world) == 75, "too soon"
    assert len(world.stages()) == 2
    for code in (75, 1):
        world.codes = [1]
        world.wait(hours=1)
        assert run(world) == code
    assert past(world)[0].state == "failed"
    assert "`masklock train" in past(world)[0].reason
    world.wait(days=2)
    assert run(world) == 0, "the same trigger is not tried for ever"


def test_bad_input_is_not_tried_again(world):
    drift(world)
    world.codes = [0, 2]
    assert run(world) == 1
    assert past(world)[0].failures == 1


def test_a_stopped_stage_goes_on_at_the_next_tick(world):
    drift(world)
    world.codes = [0, 75]
    assert run(world) == 75
    assert past(world)[0].state == "training"
    assert run(world) == 0
    assert past(world)[0].state == "promoted"


def test_a_recipe_that_changes_meanwhile_does_not_reach_what_was_begun(world):
    drift(world)
    world.codes = [0, 75]
    run(world)
    world.recipe |= {"output_dir": str(world.folder / "elsewhere"), "name": "other"}
    assert run(world) == 0
    (one,) = past(world)
    assert (one.state, Path(one.facts["run"]).parent) == ("promoted", world.folder / "runs")


def test_new_labels_are_trained_on_with_old_rows(world):
    world.policy["triggers"] = {"labels": {"rows": 3}}
    world.policy["data"] = {"new": [str(world.folder / "labels" / "*.jsonl")], "replay_share": 0.5}
    world.add_labels("a.jsonl", ["one", "test 5"])
    run(world)
    assert past(world) == []
    world.add_labels("b.jsonl", ["three", "four"])
    run(world)
    rows = past(world)[0].facts["rows"]
    assert (rows["new"], rows["replayed"], rows["left_out"]["frozen"]) == (3, 20, 1)


def test_a_kpi_below_its_bound_triggers(world):
    kpi = {"metric": "drift/clicks/mean", "below": 0.9, "at_least": 2, "of_windows": 2}
    world.policy["triggers"] = {"kpi": kpi}
    world.add_window(world.champion_run(), **{"drift/clicks/mean": 0.8})
    run(world)
    assert past(world) == []
    world.add_window(world.champion_run(), **{"drift/clicks/mean": 0.85})
    run(world)
    assert past(world)[0].evidence["kpi"]["values"] == {"1": 0.8, "2": 0.85}


def test_a_kpi_that_no_window_has_is_an_error_with_the_nearest_one(world):
    kpi = {"metric": "drift/click/mean", "below": 0.9, "at_least": 1, "of_windows": 2}
    world.policy["triggers"] = {"kpi": kpi}
    world.add_window(world.champion_run(), **{"drift/clicks/mean": 0.8})
    assert run(world) == 0
    world.add_window(world.champion_run(), **{"drift/clicks/mean": 0.8})
    with pytest.raises(ConfigError, match="did you mean drift/clicks/mean?"):
        run(world)


def test_labels_that_come_later_are_one_window_with_the_first(world):
    run_folder = world.champion_run()
    world.add_window(run_folder, "warning")
    world.add_window(run_folder, "critical", again=1, **{"drift/performance/accuracy": 0.5})
    (one,) = read_windows(run_folder / "monitoring" / "history.sqlite")
    assert (one.id, one.severity, len(one.alerts)) == (2, "critical", 2)
    assert one.measures == {"drift/performance/accuracy": 0.5}
    assert read_windows(run_folder / "monitoring" / "history.sqlite", after=2) == []


def test_manual_starts_at_once(world):
    assert run(world, manual=True) == 0
    assert past(world)[0].trigger == "manual: asked for by hand"
    world.next_model_is(0.9)
    assert run(world, manual=True) == 0
    assert len(past(world)) == 2


def test_a_pause_holds_everything(world):
    drift(world)
    interfere(world.plan(), pause=True, now=world.now)
    assert run(world) == 0
    assert past(world) == []
    interfere(world.plan(), pause=False, now=world.now)
    run(world)
    assert len(past(world)) == 1


def test_a_champion_that_is_gone_is_an_error_and_later_a_recorded_failure(world):
    drift(world)
    world.codes = [0, 75]
    run(world)
    folder = world.registry.get("champion").folder
    folder.rename(folder.with_name("elsewhere"))
    assert run(world) == 1
    assert "is not there" in past(world)[0].reason
    with pytest.raises(RegistryError, match="champion .* was to be in"):
        run(world)


def test_a_second_tick_at_once_is_told_to_try_later(world):
    drift(world)
    outcome = []

    def second(words, log):
        with pytest.raises(BusyError) as error:
            run(world)
        outcome.append(error.value.exit_code)
        return world.run(words, log)

    assert tick(world.plan(), now=world.now, starter=lambda lock: second) == 0
    assert outcome == [75] * 4
    assert len(past(world)) == 1


def test_a_champion_moved_meanwhile_is_not_overwritten(world):
    drift(world)
    world.codes = [0, 0, 0, 75]
    run(world)
    other = world.folder / "runs" / "other"
    from retraining_doubles import RunFolder, write_model, write_text

    write_text(other / "config.yaml", json.dumps(world.recipe | {"name": "other"}))
    write_model(RunFolder(other), 0.75)
    moved = world.registry.register(RunFolder(other)).name
    world.registry.promote(moved)
    run(world)
    assert past(world)[0].state == "rejected"
    assert world.registry.aliases().champion == moved


@pytest.mark.parametrize("peft", [None, {"peft_type": "LORA"}])
def test_starting_from_the_champion_takes_weights_that_stay(world, peft):
    world.recipe["model"] = {"task": "text-classification", "model_name_or_path": "hub/name"}
    world.recipe["peft"] = peft
    world.policy["start_from"] = "champion"
    champion = world.registry.get(world.make_champion(0.7)).folder
    drift(world)
    run(world)
    (one,) = past(world)
    config = world.plan().folder / f"0001-{one.key[:8]}" / "config.yaml"
    start = json.loads(config.read_text())["model"]["model_name_or_path"]
    kept = champion / "model" if peft is None else champion.parents[1] / "whole" / champion.name
    assert (one.state, Path(start)) == ("promoted", kept)
    assert (kept / "weights").is_file()


def test_a_clock_going_backwards_starts_nothing(world):
    world.policy["triggers"] = {"schedule": {"every": "1h"}}
    world.wait(hours=-5)
    assert run(world) == 0
    assert past(world) == []


def test_explaining_says_where_it_stands_and_changes_nothing(world):
    drift(world)
    said = "\n".join(reasons(world.plan(), world.now))
    assert "drift       fires: 2 of the last 2 windows raised an alert" in said
    assert "next        retraining" in said
    assert past(world) == []
    run(world)
    said = "\n".join(reasons(world.plan(), world.now))
    assert "watching" in said
    assert "promoted" in said
