"""Retraining policies: the shipped one is valid, and bad ones say all that is wrong at once."""

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from launch.retrain.load import known_metrics, load_plan
from launch.retrain.schedule import last_turn, never_fires, next_turn
from monitoring.comparison import OOD_SCORES
from pipeline.errors import ConfigError
from pipeline.evaluation.ood.registry import SCORES

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = ROOT / "configs" / "monitoring" / "retrain.yaml"
NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)


@pytest.fixture(autouse=True)
def _from_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def problems(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_plan(SHIPPED, overrides)
    return error.value.problems


def test_the_shipped_policy_is_valid_and_takes_overrides():
    plan = load_plan(SHIPPED, ["data.new=[labels/*.jsonl]", "triggers.labels={rows: 5}"])
    assert plan.policy.data.new == ["labels/*.jsonl"]
    assert plan.recipe.name == "quickstart"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("gate.metrics={acuracy: {}}", "no such metric for this recipe; did you mean accuracy?"),
        ("gate.metrics={clicks: {}}", "there are: accuracy, nll, ece, ood/unseen_packages/msp"),
        ("gate.metrics={}", "gate.metrics is empty"),
        ("triggers.schedule={every: 0d}", "never fires"),
        ("triggers.schedule={cron: 0 0 30 2 *}", "never fires: there is no such day"),
        ("triggers.schedule={cron: every day}", "was to have five fields"),
        ("triggers.schedule={cron: 0 0 * * mon-}", "cannot be read"),
        ("triggers.schedule={}", "exactly one of every and cron"),
        ("triggers.drift={at_least: 4, of_windows: 3}", "can never be reached"),
        ("triggers.kpi={metric: clicks, below: 1}", "no measure of a window"),
        ("triggers.kpi={metric: drift/performance/acc, below: 1}", "there is no drift/perf"),
        ("triggers.kpi={metric: drift/clicks/mean}", "exactly one of below and above"),
        ("triggers.labels={rows: 5}", "triggers.labels never fires without data.new"),
        ("limits.cooldown=soon", "such as 30m, 12h or 7d; found 'soon'"),
        ("limits.cooldwn=1d", "unknown key; did you mean cooldown?"),
        ("gate.metrics={accuracy: {margn: 1}}", "unknown key; did you mean margin?"),
        ("recipe=nowhere.yaml", "no such file"),
        ("overrides=[train.max_step=3]", "did you mean"),
    ],
)
def test_a_bad_policy_says_what_is_wrong(override, said):
    assert any(said in problem for problem in problems(override))


def test_all_problems_come_at_once_with_their_lines(tmp_path):
    text = SHIPPED.read_text().replace("name: quickstart\n", "").replace("accuracy:", "acuracy:")
    bad = tmp_path / "bad.yaml"
    bad.write_text(text.replace("cooldown:", "coldown:"))
    with pytest.raises(ConfigError) as error:
        load_plan(bad)
    assert len(error.value.problems) == 2
    assert "limits.coldown: unknown key; did you mean cooldown? (line" in str(error.value)


def test_a_file_that_is_no_policy_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_plan(tmp_path / "nowhere.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="a policy is a mapping"):
        load_plan(tmp_path / "list.yaml")


def test_a_gate_may_ask_for_every_score_there_is():
    assert {score for scores in OOD_SCORES.values() for score in scores} == set(SCORES)
    assert "ood/unseen_packages/energy" in known_metrics(load_plan(SHIPPED).recipe)


def test_of_turns_that_were_missed_the_last_one_is_caught_up_on():
    day = timedelta(days=1)
    assert last_turn(NOON + 3.5 * day, NOON, day, None) == NOON + 3 * day
    assert last_turn(NOON + 0.9 * day, NOON, day, None) is None
    assert last_turn(NOON - day, NOON, day, None) is None, "the clock went backwards"
    assert next_turn(NOON + 3.5 * day, NOON, day, None) == NOON + 4 * day


def test_cron_is_read_in_utc():
    monday = datetime(2026, 3, 9, 3, tzinfo=UTC)
    assert never_fires("0 3 * * 1") is None
    assert last_turn(NOON + timedelta(days=14), NOON, None, "0 3 * * 1") == monday + timedelta(7)
    assert last_turn(monday, NOON, None, "0 3 * * 1") == monday
    assert last_turn(monday, monday, None, "0 3 * * 1") is None
    assert next_turn(NOON, NOON, None, "0 3 * * 1") == monday


def test_a_tick_with_nothing_to_do_costs_little(world):
    """Less than a second of CPU, and no torch."""
    world.plan()
    watched = "import resource, sys; sys.argv = ['masklock', 'retrain', *sys.argv[1:], '--once']\n"
    watched += (
        "import pipeline.__main__ as line\ntry:\n    line.main()\nexcept SystemExit as end:\n"
    )
    watched += "    assert not end.code and not {'torch', 'datasets'} & set(sys.modules)\n"
    watched += "    used = resource.getrusage(resource.RUSAGE_SELF)\n"
    watched += "    sys.stdout.write(str(used.ru_utime + used.ru_stime))"
    policy = str(world.folder / "policy.yaml")
    world.registry.get("champion")
    words = [sys.executable, "-c", watched, policy]
    found = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    assert float(found.stdout) < 1.0
