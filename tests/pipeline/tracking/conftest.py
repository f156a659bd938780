"""The real wandb client against a server on this machine, and runs that train in a second."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))  # the server is no test and no fixture

from wandb_server import WandbServer  # noqa: E402

KEY = "c0ffee" + "0" * 28 + "canary"
BERT = {
    "hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 1,
    "intermediate_size": 32, "max_position_embeddings": 24,
}  # fmt: skip
NUM_STEPS = 6


@pytest.fixture(scope="session")
def api_key() -> str:
    """What must be found in no byte that is written."""
    return KEY


@pytest.fixture
def server(monkeypatch, tmp_path) -> Iterator[WandbServer]:
    """A server, to which everything in this test is online."""
    server = WandbServer()
    _set_environment(monkeypatch, server, tmp_path)
    yield server
    server.die()
    assert _files_with_the_key(tmp_path) == []


@pytest.fixture(scope="module")
def module_server(tmp_path_factory) -> Iterator[WandbServer]:
    """The same for all tests of a module."""
    server, home = WandbServer(), tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        _set_environment(patch, server, home)
        yield server
    server.die()
    assert _files_with_the_key(home) == []


@pytest.fixture(autouse=True)
def _no_process_is_left_behind() -> Iterator[None]:
    yield
    end = time.monotonic() + 5
    while any("wandb" in " ".join(_words(child)) for child in psutil.Process().children(True)):
        assert time.monotonic() < end
        time.sleep(0.05)


def _words(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):  # it has ended meanwhile
        return process.cmdline()
    return []


def _files_with_the_key(folder: Path) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if KEY.encode() in path.read_bytes()]


def _set_environment(patch: pytest.MonkeyPatch, server: WandbServer, home: Path) -> None:
    patch.setenv("WANDB_CONFIG_DIR", str(home / "config"))
    patch.setenv("WANDB_CACHE_DIR", str(home / "cache"))
    patch.setenv("WANDB_MODE", "online")
    patch.setenv("WANDB_BASE_URL", server.url)
    patch.setenv("WANDB_API_KEY", KEY)
    patch.setenv("WANDB__FILE_STREAM_TRANSMIT_INTERVAL", "1")


@pytest.fixture(scope="session")
def masklock() -> Callable[..., str]:
    """The command line, in this process; its output."""
    from pipeline.__main__ import app

    def invoke(*words: str | Path, exit_code: int = 0) -> str:
        result = CliRunner().invoke(app, list(map(str, words)))
        assert result.exit_code == exit_code, (result.output, result.exception)
        return result.output

    return invoke


@pytest.fixture(scope="session")
def make_config() -> Callable[..., Path]:
    """Writes data and `run.yaml` of a small BERT into a folder; sections on top."""
    return _write_config


def _write_config(folder: Path, **sections) -> Path:
    sizes = {"train": 48, "validation": 16, "test": 64, "other": 16, "window": 64}
    for split, count in sizes.items():
        lines = [json.dumps(_row(split, number)) for number in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
    other = {"path": "json", "data_files": str(folder / "other.jsonl")}
    config = {
        "name": "run",
        "output_dir": str(folder / "runs"),
        "model": {
            "task": "text-classification", "model_type": "bert", "config_overrides": BERT,
            "tokenizer_vocab_size": 300,
        },
        "data": {"path": "json", "data_files": files, "max_length": 16, "ood": {"other": other}},
        "dropout": {"hidden": 0.1, "head": {"rate": 0.2, "learned": True}},
        "train": {
            "global_batch_size": 8, "max_steps": NUM_STEPS, "logging_steps": 1, "eval_steps": 3,
            "use_cpu": True, "disable_tqdm": True,
        },
        "evaluation": {"num_mc_passes": 3, "num_bootstrap_resamples": 20},
        "wandb": {"timeout_seconds": 20},
    } | sections  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def _row(split: str, number: int) -> dict[str, str]:
    label = ("animal", "colour")[number % 2]
    word = {"animal": "cow cat hen", "colour": "red blue pink"}[label].split()[number % 3]
    if split == "other":
        return {"text": f"integral of sine {number}"}
    return {"text": f"the {word} of {split} {number}", "label": label}
