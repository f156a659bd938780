"""Whatever fails on one process ends all of them within half a minute, with the cause said once."""

import json

import pytest

SCRIPT = """
import os, signal, sys
import pipeline.callbacks, pipeline.train
from pipeline.errors import DataError

what, rank = sys.argv.pop(1), int(os.environ["RANK"])
sys.argv[1:] = ["train", "run.yaml", f"name={what}"]


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def fail(error):
    def failing(*args, **kwargs):
        raise error

    return failing


if rank == 1:
    if what == "config":
        sys.argv.append("train.learning_rate=0.5")
    elif what == "data":
        pipeline.train.load_raw = fail(DataError("rows are missing on one machine"))
    elif what == "seed":
        bind = pipeline.train.KeyedDropout
        pipeline.train.KeyedDropout = lambda model, plan, seed: bind(model, plan, seed + 1)
    elif what == "crash":
        pipeline.callbacks.Meter.count_tokens = fail(ValueError("a bug on one process"))
    elif what == "killed":
        pipeline.callbacks.Meter.count_tokens = die
    elif what == "killed-early":
        pipeline.train.prepare_data = die
from pipeline.__main__ import main

main()
"""
CAUSES = {
    "config": "train.learning_rate: 0.01 -> 0.5",
    "seed": "seed 43, process 0 has 42",
    "data": "masklock: rows are missing on one machine",
    "crash": "ValueError: a bug on one process",
    "killed": "ended without a word",
    "killed-early": "ended without a word",
}
DRILLS = ("seed", "data", "crash", "killed-early")


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=[pytest.mark.drill] * (what in DRILLS)) for what in CAUSES]
)
def test_one_process_fails_and_all_end_with_its_cause(folder, what):
    ended = folder.under_torchrun(SCRIPT, what)
    assert ended.code != 0
    assert ended.seconds < 30 + folder_seconds(ended)
    assert ended.text.count(CAUSES[what]) == 1, ended.text
    assert ended.text.count("Traceback") <= 2  # the launcher's own, and that of a bug
    assert not (folder.run(what) / "model").exists()


def folder_seconds(ended):
    """What a start takes on a busy machine before anything can fail."""
    return 20


@pytest.mark.usefixtures("needs_deepspeed")
def test_a_loss_that_is_not_finite_on_one_process_stops_all_before_the_update(folder):
    """Under ZeRO-2, where `backward` steps the engine: rows 5 alone overflow, in the third step."""
    lines = (folder.path / "train.jsonl").read_text().splitlines()
    (folder.path / "poison.jsonl").write_text("\n".join(lines))
    ended = folder.under_torchrun(POISON)
    assert ended.code != 0
    assert ended.text.count("The update was not applied") == 1, ended.text
    written = [path.name for path in folder.run("poisoned").glob("checkpoint-*")]
    assert sorted(written) == ["checkpoint-1"]
    facts = json.loads((folder.run("poisoned") / "checkpoint-1" / "manifest.json").read_text())
    assert facts["zero_stage"] == 2


POISON = """
import os, sys
import torch

os.environ.update(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO3_INIT="false")
os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = "configs/deepspeed/zero2.json"
sys.argv[1:] = ["train", "run.yaml", "name=poisoned"]
import pipeline.trainer

honest = pipeline.trainer.LockedTrainer.training_step


def poisoned(self, model, inputs, num_items_in_batch=None):
    step, is_last = int(inputs["mask_step"][0]), self.accelerator.sync_gradients
    if step == 1 and is_last and os.environ["RANK"] == "1":
        loss = self.compute_loss_func
        self.compute_loss_func = lambda *args, **kwargs: loss(*args, **kwargs) * float("nan")
    return honest(self, model, inputs, num_items_in_batch)


pipeline.trainer.LockedTrainer.training_step = poisoned
from pipeline.__main__ import main

main()
"""
