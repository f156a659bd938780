"""The files of one retraining, and its stages: each can be started again after any kill."""

import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from launch.registry import Version
from launch.retrain.configs import bench_config, challenger_config
from launch.retrain.load import Plan
from launch.retrain.processes import STOPPED, Run, last_lines
from launch.retrain.rows import Columns
from launch.retrain.store import Retraining
from pipeline.config.load import dump_config, load_config
from pipeline.config.schema import RunConfig
from pipeline.records import RunFolder, write_text

logger = logging.getLogger(__name__)
_PERMANENT = 2


class StageStopped(Exception):
    """The stage was stopped after saving; it goes on when it is started again."""


class StageFailed(Exception):
    """The stage ended with an error; `permanent` when trying again cannot help."""

    def __init__(self, said: str, permanent: bool) -> None:
        super().__init__(said)
        self.permanent = permanent


@dataclass(frozen=True)
class Place:
    """The files of one retraining.

    Args:
        run: starts a stage; see `processes`.
    """

    plan: Plan
    one: Retraining
    run: Run

    @property
    def folder(self) -> Path:
        """Everything but the challenger's run."""
        return folder_of(self.plan.folder, self.one)

    @property
    def base(self) -> Path:
        """The recipe's rows."""
        return self.folder / "base"

    @property
    def data(self) -> Path:
        """The challenger's rows."""
        return self.folder / "data"

    @property
    def bench(self) -> RunFolder:
        """The champion, to be judged on the same rows."""
        return RunFolder(self.folder / "champion")

    @property
    def challenger(self) -> RunFolder:
        """The challenger's run, a run like any other."""
        return RunFolder(Path(self.one.facts["run"]))

    @property
    def config(self) -> Path:
        """The challenger's configuration: later changes of the recipe do not reach it."""
        return self.folder / "config.yaml"

    @property
    def columns(self) -> Columns:
        """Names of the columns of its rows."""
        data = self.plan.recipe.data
        has_labels = self.plan.recipe.model.task == "text-classification"
        label = data.label_column_name if has_labels else None
        return Columns(data.text_column_name, label, data.domain_column_name)

    # -- stages ----------------------------------------------------------------------------------

    def write_base(self) -> None:
        """The recipe's rows as files."""
        if (self.base / "rows.json").is_file():
            return
        recipe = self.folder / "recipe.yaml"
        write_text(recipe, dump_config(self.plan.recipe))
        self._stage("rows", str(recipe), str(self.base))

    def write_config(self, champion: Version) -> Path:
        """The challenger's configuration; returns the folder that its run will have."""
        if not self.config.is_file():
            start = self._start(champion) if self.plan.policy.start_from == "champion" else None
            recipe = self.plan.recipe
            name = f"{recipe.name}-{self.one.key[:8]}"
            config = challenger_config(recipe, name, self.data, champion.run.model, start)
            write_text(self.config, dump_config(config))
        config = self._config()
        return Path(config.output_dir) / config.name

    def _start(self, champion: Version) -> Path:
        """The champion's whole weights, where they stay: what starts from them needs them later."""
        if load_config(champion.folder, check_installed=False).peft is None:
            return champion.run.model
        whole = Path(self.plan.policy.registry) / "whole" / champion.name
        if not whole.is_dir():
            self._stage("export", str(champion.folder), str(whole))
        return whole

    def train(self) -> None:
        """Train the challenger, or go on."""
        words = ["train", str(self.config)]
        policy = self.plan.policy
        if policy.accelerate_config is not None:
            words += ["--accelerate-config", policy.accelerate_config]
        if policy.num_processes is not None:
            words += ["--num-processes", str(policy.num_processes)]
        self._stage(*words)

    def evaluate_challenger(self) -> None:
        """The challenger on the frozen rows."""
        self._evaluate(self.challenger, "challenger.evaluated")

    def evaluate_champion(self, champion: Version) -> None:
        """The champion on the same rows, with the same masks; its version is not written to."""
        bench = self.bench
        if not bench.config.is_file():
            for name in ("plan.json", "labels.json", "model"):
                _link(champion.folder / name, bench.path / name)
            config = bench_config(
                load_config(champion.folder, check_installed=False), self._config(), "champion"
            )
            write_text(bench.config, dump_config(config))
        self._evaluate(bench, "champion.evaluated")

    def clean(self) -> None:
        """Remove what nobody reads after the end."""
        for name in ("base", "champion/model"):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def _config(self) -> RunConfig:
        return load_config(self.config, check_installed=False)

    def _evaluate(self, run: RunFolder, marker: str) -> None:
        done = self.folder / marker
        if not done.is_file():
            self._stage("evaluate", str(run.path))
            write_text(done, "")

    def _stage(self, *words: str) -> None:
        log = self.folder / "log.txt"
        logger.info("masklock %s", " ".join(words))
        code = self.run(words, log)
        if code == STOPPED:
            raise StageStopped(f"`masklock {words[0]}` was stopped after saving.")
        if code != 0:
            raise StageFailed(
                f"`masklock {' '.join(words)}` ended with {code}; the end of {log}:\n"
                f"{last_lines(log)}",
                permanent=code == _PERMANENT,
            )


def folder_of(line: Path, one: Retraining) -> Path:
    """The folder of a retraining in that of its line."""
    return line / f"{one.number:04d}-{one.key[:8]}"


def ranges_of(one: Retraining) -> dict[str, range]:
    """Row numbers of each retention set."""
    found = one.facts["rows"]["retention"]
    return {name: range(start, end) for name, (start, end) in found.items()}


def _link(source: Path, place: Path) -> None:
    """The same bytes at a second place; a copy where the file system has no links."""
    if not source.exists():
        return
    for path in [source] if source.is_file() else sorted(source.rglob("*")):
        if path.is_file():
            target = place / path.relative_to(source) if source.is_dir() else place
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            try:
                os.link(path, target)
            except OSError:
                shutil.copyfile(path, target)
