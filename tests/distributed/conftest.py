"""Real processes on loopback: a run of a few thousand weights, started as a user would start it."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pipeline.verify.stage import end_with_children

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 240  # of one launch, on machines that do other work too
TEST_SECONDS = 2 * LIMIT_SECONDS  # the launch's own limit comes first: it says what was said
CONFIG = """
name: one
model:
  task: text-classification
  model_type: bert
  tokenizer_vocab_size: 300
  config_overrides: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2,
                     intermediate_size: 64, max_position_embeddings: 32}
data: {path: json, data_files: FILES, max_length: 16}
train: {global_batch_size: 8, per_device_train_batch_size: 2, max_steps: 4, logging_steps: 1,
        adam_epsilon: 1e-3, learning_rate: 1e-2, weight_decay: 0.1, warmup_steps: 2, save_steps: 1,
        save_total_limit: 9}
dropout: {hidden: 0.2, attention: 0.1}
wandb: {mode: disabled}
"""


def pytest_collection_modifyitems(items):
    """Tests that launch have time for it."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.timeout(TEST_SECONDS))


@dataclass(frozen=True)
class Ended:
    """A launch that is over."""

    code: int
    text: str
    seconds: float


class Folder:
    """A folder with data and a configuration, to launch runs in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        for split, count in (("train", 21), ("validation", 5), ("test", 5)):
            lines = (json.dumps(row(number)) for number in range(count))
            (path / f"{split}.jsonl").write_text("\n".join(lines))
        files = {split: f"{split}.jsonl" for split in ("train", "validation", "test")}
        (path / "run.yaml").write_text(CONFIG.replace("FILES", json.dumps(files)))

    def train(self, name, *words, engine=None, num_processes=2):
        """`masklock train`, alone or with a preset."""
        options = ["--accelerate-config", engine, "--num-processes", str(num_processes)]
        command = [sys.executable, "-m", "pipeline", "train", "run.yaml", f"name={name}", *words]
        return self.execute([*command, *(options if engine else [])])

    def verify_sync(self, layouts, *words):
        """Of every layout, its state and in what it differs."""
        command = [sys.executable, "-m", "pipeline", "verify-sync", "run.yaml", *words]
        ended = self.execute([*command, "--layouts", layouts, "--json"])
        begun = ended.text.find('{\n  "layouts"')
        assert begun >= 0, ended.text
        found, _ = json.JSONDecoder().raw_decode(ended.text, begun)
        return [(each["layout"], each["state"], each["differences"]) for each in found["layouts"]]

    def under_torchrun(self, script, *words):
        """A script of its own as two processes."""
        (self.path / "script.py").write_text(script)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
        return self.execute([*command, "--standalone", "script.py", *words])

    def execute(self, command):
        """A command with all that it starts, none of which outlives its limit."""
        started = time.monotonic()
        with subprocess.Popen(
            command,
            cwd=self.path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            try:
                said, _ = process.communicate(timeout=LIMIT_SECONDS)
            except subprocess.TimeoutExpired:
                end_with_children(process)
                pytest.fail(f"no end within {LIMIT_SECONDS} s:\n{process.communicate()[0]}")
        return Ended(process.returncode, said, time.monotonic() - started)

    def run(self, name):
        return self.path / "runs" / name

    def weights(self, name):
        return load_file(self.run(name) / "model" / "model.safetensors")

    def distance(self, name, other="one"):
        """The largest difference of a weight between two runs."""
        mine, theirs = self.weights(name), self.weights(other)
        assert mine.keys() == theirs.keys()
        return max(float((mine[key] - theirs[key]).abs().max()) for key in mine)

    def back_to(self, name, step):
        """The run as if it had been stopped after a step."""
        for checkpoint in self.run(name).glob("checkpoint-*"):
            if int(checkpoint.name.split("-")[1]) > step:
                remove(checkpoint)
        remove(self.run(name) / "model")


def row(number):
    return {"text": f"word {number} of {number % 3}" * (1 + number % 3), "label": "ab"[number % 2]}


def remove(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """With a finished run `one` of one process: the reference."""
    made = Folder(tmp_path_factory.mktemp("distributed"))
    ended = made.train("one")
    assert ended.code == 0, ended.text
    return made


@pytest.fixture
def needs_deepspeed():
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: pip install -e '.[deepspeed]'")
