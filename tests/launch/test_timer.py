"""Retraining on a timer: systemd and cron themselves judge what is rendered."""

import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from croniter import croniter

from launch.schedule import _CRON, Schedule
from launch.timer import Retraining, cron_lines, systemd_units
from pipeline.__main__ import app
from pipeline.errors import ConfigError

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not on this machine"
)


@pytest.fixture
def retraining(tmp_path):
    folder = tmp_path / "50% of $HOME"
    folder.mkdir()
    masklock = folder / "masklock"
    masklock.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > words\nexit 75\n')
    masklock.chmod(0o755)
    return Retraining("nightly", folder / "my policy.yaml", folder, masklock, Schedule("6h"))


@needs_systemd
def test_systemd_takes_the_units(retraining, tmp_path):
    units = tmp_path / "units"
    units.mkdir()
    for name, text in systemd_units(retraining).items():
        (units / name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, units.iterdir())],
        capture_output=True,
        text=True,
    )
    about_ours = [line for line in done.stderr.splitlines() if "masklock" in line]
    assert (done.returncode, about_ours) == (0, [])


@needs_systemd
@pytest.mark.parametrize("every", _CRON)
def test_systemd_and_cron_mean_the_same_moments(every):
    schedule, start = Schedule(every), datetime(2026, 3, 28, 22, 7, tzinfo=UTC)
    expected = croniter(schedule.cron, start).get_next(datetime)
    done = subprocess.run(
        ["systemd-analyze", "calendar", "--base-time=2026-03-28 22:07:00 UTC", schedule.calendar],
        capture_output=True,
        text=True,
        env={"TZ": "UTC", "PATH": "/usr/bin:/bin"},
        check=True,
    )
    assert f"{expected:%Y-%m-%d %H:%M:%S} UTC" in done.stdout


@pytest.mark.parametrize("every", _CRON)
def test_turns_come_at_the_interval_that_was_asked_for(every):
    turns = croniter(Schedule(every).cron, datetime(2026, 1, 5, tzinfo=UTC))
    first, second = turns.get_next(datetime), turns.get_next(datetime)
    unit = {"m": "minutes", "h": "hours", "d": "days"}[every[-1]]
    assert second - first == timedelta(**{unit: int(every[:-1])})


def test_the_line_of_cron_runs_what_it_says(retraining):
    line = cron_lines(retraining).splitlines()[-1]
    schedule, command = " ".join(line.split(" ")[:5]), " ".join(line.split(" ")[5:])
    assert schedule == "0 */6 * * *"
    done = subprocess.run(["sh", "-c", command.replace("\\%", "%")], cwd="/")  # as cron would
    words = (retraining.directory / "words").read_text().splitlines()
    assert (done.returncode, words) == (75, ["retrain", str(retraining.policy), "--once"])


def test_secrets_stay_in_a_file_of_the_users(retraining, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "canary")
    text = "".join(systemd_units(retraining).values()) + cron_lines(retraining)
    assert "EnvironmentFile=-%h/.config/masklock/secrets.env" in text
    assert "canary" not in text


ROOT = Path(__file__).resolve().parents[2]
POLICY = "configs/monitoring/retrain.yaml"


def test_units_land_where_they_are_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    app(["launch", "systemd", POLICY, "--output", str(tmp_path)], standalone_mode=False)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "masklock-retrain-quickstart.service",
        "masklock-retrain-quickstart.timer",
    }
    assert "enable --now masklock-retrain-quickstart.timer" in capsys.readouterr().out


def test_a_policy_with_a_mistake_is_not_scheduled(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    broken = tmp_path / "broken.yaml"
    broken.write_text(Path(POLICY).read_text().replace("start_from: base", "start_from: nothing"))
    with pytest.raises(ConfigError, match="start_from"):
        app(["launch", "systemd", str(broken), "--output", str(tmp_path)], standalone_mode=False)
    assert [path.name for path in tmp_path.iterdir()] == ["broken.yaml"]
