"""Whatever happens to W&B, the training is the same and says how many rows arrived."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import TrainerCallback

from pipeline.config.load import load_config
from pipeline.records import RunFolder, sha256_of_file
from pipeline.tracking.wandb_file import num_history_rows
from pipeline.train import train

NUM_ROWS = 8  # six steps, two of them with an evaluation


class AtStep(TrainerCallback):
    """Does something after a step; waits first until the rows before it have arrived."""

    def __init__(self, step: int, act: Callable[[], None], server=None) -> None:
        self.step, self.act, self.server = step, act, server

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            end = time.monotonic() + 20
            while self.server.num_rows() < self.step:
                assert time.monotonic() < end
                time.sleep(0.02)
            self.act()


def trained(config_path: Path, timeout_seconds: float, callback: TrainerCallback | None = None):
    """Sum of the weights, and what the training said at its end."""
    config = load_config(str(config_path), [f"wandb.timeout_seconds={timeout_seconds}"])
    said: list[str] = []
    instrument = (lambda trainer: trainer.add_callback(callback)) if callback else None
    assert train(config, said.append, instrument) == 0
    folder = RunFolder(Path(config.output_dir) / config.name)
    return sha256_of_file(folder.model / "model.safetensors"), said[-1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, make_config) -> str:
    """Weights of the training that no tracker could disturb."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        folder = tmp_path_factory.mktemp("undisturbed")
        return trained(make_config(folder), 1)[0]


@pytest.mark.parametrize("fault", ["absent at start", "hangs at start"])
def test_a_server_that_never_answers(server, undisturbed, make_config, tmp_path, fault):
    server.die() if "absent" in fault else server.hang()
    weights, sentence = trained(make_config(tmp_path), timeout_seconds=2)

    assert weights == undisturbed
    assert f"(online): 0 of {NUM_ROWS} rows arrived; dropped: no answer within 2 s" in sentence


@pytest.mark.parametrize("fault", ["dies", "hangs"])
def test_a_server_that_fails_in_the_middle(server, undisturbed, make_config, tmp_path, fault):
    act = server.die if fault == "dies" else server.hang
    config = make_config(tmp_path)
    weights, sentence = trained(config, 8, AtStep(3, act, server))  # opening a run takes seconds

    assert weights == undisturbed
    arrived = int(re.search(r"\(online\): (\d+) of 8 rows arrived", sentence)[1])
    assert 3 <= arrived <= server.num_rows() < NUM_ROWS
    segment = re.search(r"send the others with `wandb sync --include-online (.+)`", sentence)[1]
    (file,) = Path(segment).glob("*.wandb")
    assert num_history_rows(file) == NUM_ROWS


def test_a_disk_that_is_full_for_the_tracker(undisturbed, make_config, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # of the process that holds the run
    monkeypatch.setenv("WANDB_MODE", "offline")
    weights, sentence = trained(make_config(tmp_path), 20)

    assert weights == undisturbed
    assert int(re.search(r"\(offline\): (\d+) of 8 rows arrived", sentence)[1]) < NUM_ROWS
    assert "is the disk full?" in sentence or "dropped" in sentence
