"""A small line of models whose stages take milliseconds: a model is a number, its accuracy."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from launch.registry import Registry
from launch.retrain import place
from launch.retrain.load import Plan, load_plan
from monitoring.alerts import Alert
from monitoring.history import History, WindowRecord
from pipeline.config.schema import RunConfig
from pipeline.config.strict_yaml import dump_yaml
from pipeline.records import RunFolder, write_bytes, write_json, write_text

LABELS = ["down", "up"]
START = datetime(2026, 3, 2, 12, tzinfo=UTC)


def be_quick() -> None:
    """Leave out what takes nearly all the time and is tested elsewhere: YAML, and power cuts."""
    os.fsync = lambda descriptor: None
    place.load_config, place.dump_config = load_json, RunConfig.model_dump_json


def load_json(source: Path, check_installed: bool = False) -> RunConfig:
    path = source / "config.yaml" if source.is_dir() else source
    return RunConfig.model_validate_json(path.read_text())


class World:
    """A folder with a recipe, a policy, a champion and a clock that is moved by hand."""

    def __init__(self, folder: Path, num_frozen: int = 60) -> None:
        self.folder, self.time, self.num_frozen = folder, START, num_frozen
        self.codes: list[int] = []
        """Exit codes of the next stages; 0 when there are no more."""
        self.recipe = {
            "name": "tiny",
            "output_dir": str(folder / "runs"),
            "model": {"task": "text-classification", "model_type": "bert"},
            "data": {"path": "csv", "data_files": "unused.csv", "max_length": 32},
        }
        self.policy = {
            "name": "line",
            "recipe": str(folder / "recipe.yaml"),
            "registry": str(folder / "registry"),
            "work_dir": str(folder / "retrain"),
            "triggers": {"drift": {"at_least": 2, "of_windows": 3}},
            "gate": {"metrics": {"accuracy": {"margin": 0.05}}, "num_resamples": 100},
            "limits": {"cooldown": "1h", "retries": 2, "backoff": "10m"},
        }

    def now(self) -> datetime:
        return self.time

    def wait(self, **span: float) -> None:
        self.time += timedelta(**span)

    @property
    def registry(self) -> Registry:
        return Registry(self.folder / "registry", self.now)

    def plan(self) -> Plan:
        write_text(self.folder / "recipe.yaml", dump_yaml(self.recipe))
        write_text(self.folder / "policy.yaml", dump_yaml(self.policy))
        return load_plan(self.folder / "policy.yaml")

    def make_champion(self, accuracy: float = 0.7) -> str:
        run = RunFolder(self.folder / "runs" / "tiny")
        write_text(run.config, place.dump_config(RunConfig.model_validate(self.recipe)))
        write_model(run, accuracy)
        name = self.registry.register(run).name
        self.registry.promote(name)
        return name

    def next_model_is(self, accuracy: float) -> None:
        write_text(self.folder / "accuracy", str(accuracy))

    def add_window(
        self, run: Path, severity: str | None = None, again: int | None = None, **measures: float
    ) -> None:
        """A window of production that monitoring has judged; `again`: labels of an earlier one."""
        with History(run / "monitoring" / "history.sqlite") as history:
            number = len(history.windows()) + 1
            sha256 = hashlib.sha256(f"{run} {again or number}".encode()).hexdigest()
            stamp = self.time.isoformat()
            outcome = "quiet" if severity is None else "alert"
            labelled = again is not None
            record = WindowRecord(sha256, stamp, 100, outcome, labelled, measures=dict(measures))
            alert = Alert(f"{number:016d}", "tiny", None, stamp, severity, "rule", "It moved.")
            history.add_window(record, alerts=[] if severity is None else [alert])

    def windows(self, run: Path) -> list[WindowRecord]:
        with History(run / "monitoring" / "history.sqlite") as history:
            return history.windows()

    def champion_run(self) -> Path:
        return Path(self.registry.get("champion").origin["run"])

    def add_labels(self, name: str, texts: Sequence[str]) -> Path:
        rows = [json.dumps({"text": text, "label": LABELS[len(text) % 2]}) for text in texts]
        path = self.folder / "labels" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(rows) + "\n")
        return path

    # -- stages ----------------------------------------------------------------------------------

    def starter(self, lock: int) -> Callable[[Sequence[str], Path], int]:
        return self.run

    def run(self, words: Sequence[str], log: Path) -> int:
        with open(self.folder / "stages.txt", "a") as file:
            file.write(" ".join(words) + "\n")
        code = self.codes.pop(0) if self.codes else 0
        if code == 0:
            getattr(self, words[0])(*words[1:])
        return code

    def stages(self) -> list[str]:
        path = self.folder / "stages.txt"
        return path.read_text().splitlines() if path.exists() else []

    def rows(self, config: str, output: str) -> None:
        unfinished = Path(output + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for split, size in (("train", 40), ("validation", 10), ("test", self.num_frozen)):
            texts = [f"{split} {row}" for row in range(size)]
            table = pa.table({"text": texts, "label": [len(text) % 2 for text in texts]})
            parquet.write_table(table, unfinished / f"{split}.parquet")
        write_json(unfinished / "rows.json", {"label_names": LABELS})
        unfinished.rename(output)

    def export(self, version: str, output: str) -> None:
        shutil.copytree(Path(version) / "model", output)

    def train(self, config: str) -> None:
        loaded = place.load_config(Path(config))
        run = RunFolder(Path(loaded.output_dir) / loaded.name)
        write_text(run.config, Path(config).read_text())
        write_model(run, float((self.folder / "accuracy").read_text()))

    def evaluate(self, run: str) -> None:
        folder = RunFolder(Path(run))
        config = place.load_config(folder.path)
        test = parquet.read_table(config.data.data_files["test"])
        accuracy = float((folder.model / "weights").read_text())
        passes = {"num_passes": config.evaluation.num_mc_passes}
        write_json(folder.report_json, {"seed": config.seed, "mc": passes})
        sink = pa.BufferOutputStream()
        parquet.write_table(samples(test, accuracy), sink)
        write_bytes(folder.samples, sink.getvalue().to_pybytes())


def write_model(run: RunFolder, accuracy: float) -> None:
    write_json(run.plan, {"digest": "0123"})
    write_json(run.labels, LABELS)
    write_text(run.model / "weights", str(accuracy))


def samples(test: pa.Table, accuracy: float) -> pa.Table:
    """Right in the share of rows with the smallest hashes: a better model is right on more."""
    texts = test["text"].to_pylist()
    ranks = [int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32 for text in texts]
    return pa.table(
        {
            "sample_id": list(range(len(texts))),
            "split": ["test"] * len(texts),
            "text": texts,
            "label": [LABELS[label] for label in test["label"].to_pylist()],
            "prediction": ["up"] * len(texts),
            "correct": [rank < accuracy for rank in ranks],
            "confidence": [accuracy] * len(texts),
        }
    )
