"""One line of models: the state machine that a tick advances.

    idle -> triggered -> data checked -> training -> evaluating -> gated
         -> promoted (-> rolled back) | rejected | failed

Every step does its work first and then records the next state, so a kill between the two repeats
the step, and each step is one that can be repeated.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from launch.registry import Registry, Version
from launch.retrain.evidence import count_rows, files_of, history_of, read_windows
from launch.retrain.gate import Verdict, judge
from launch.retrain.load import Plan
from launch.retrain.place import Place, StageFailed, StageStopped, folder_of, ranges_of
from launch.retrain.policy import duration
from launch.retrain.processes import Run
from launch.retrain.rows import Sources, mix
from launch.retrain.store import Clock, Retraining, State, Store
from launch.retrain.triggers import Finding, Seen, findings, require_metric
from monitoring.comparison import compare_runs, read_side
from pipeline.config.load import config_hash
from pipeline.errors import DataError, InputError
from pipeline.records import RunFolder, sha256_of_file, write_json

logger = logging.getLogger(__name__)
DONE, FAILED, TRY_LATER = 0, 1, 75
_CODE = Path(__file__).resolve().parents[2] / "pipeline"


@dataclass(frozen=True)
class Line:
    """What a tick works with.

    Args:
        run: starts a stage and returns its exit code.
        now: the clock, UTC.
    """

    plan: Plan
    store: Store
    registry: Registry
    run: Run
    now: Clock

    # -- what there is to do ---------------------------------------------------------------------

    def look(self, manual: bool = False) -> tuple[Retraining | None, list[Finding]]:
        """What the triggers find, and the retraining they would start, which is not begun."""
        champion = self.registry.get("champion")
        before = self.store.retrainings()
        seen, mark = self._seen(champion, before, manual)
        found = findings(self.plan.policy, seen)
        for finding in found:
            if finding.fires:
                key = self._key(champion, finding)
                if not self.store.has(key):
                    return self._retraining(key, finding, found, champion, mark), found
        return None, found

    def waits_until(self) -> datetime | None:
        """The end of the cooldown after the last retraining; None when it is over."""
        ended = [one for one in self.store.retrainings() if not one.is_open]
        if not ended:
            return None
        end = datetime.fromisoformat(ended[-1].facts.get("ended", ended[-1].changed))
        end += duration(self.plan.policy.limits.cooldown)
        return end if self.now() < end else None

    def place(self, one: Retraining) -> Place:
        """The files of a retraining."""
        return Place(self.plan, one, self.run)

    def history(self, champion: Version) -> Path:
        """Where monitoring tells about the champion."""
        if self.plan.policy.history is not None:
            return Path(self.plan.policy.history)
        return history_of(RunFolder(Path(champion.origin["run"])))

    def _seen(
        self, champion: Version, before: list[Retraining], manual: bool
    ) -> tuple[Seen, dict[str, Any]]:
        answered = [one for one in before if one.state != "failed"]
        last = answered[-1].seen if answered else {}
        history = self.history(champion)
        after = int(last["window"]) if last.get("history") == str(history) else 0
        windows = read_windows(history, after)
        require_metric(self.plan.policy.triggers.kpi, windows)
        rows = self._row_counts()
        since = answered[-1].started if answered else champion.created
        seen = Seen(
            now=self.now(),
            since=datetime.fromisoformat(since),
            windows=windows,
            rows=rows,
            rows_before=last.get("rows", {}),
            manual=len(before) if manual else None,
        )
        newest = max((one.id for one in windows), default=after)
        return seen, {"history": str(history), "window": newest, "rows": rows}

    def _row_counts(self) -> dict[str, int]:
        """Rows of each file of new labels; files are counted again only when they changed."""
        if self.plan.policy.triggers.labels is None:
            return {}
        known = json.loads(self.store.setting("row counts") or "{}")
        counts = {}
        for path in files_of(self.plan.policy.data.new):
            status = path.stat()
            mark = [status.st_size, status.st_mtime_ns]
            name = str(path)
            found = known.get(name)
            counts[name] = found if found and found[:2] == mark else [*mark, count_rows(path)]
        if counts != known:
            self.store.set("row counts", json.dumps(counts))
        return {name: entry[2] for name, entry in counts.items()}

    def _key(self, champion: Version, finding: Finding) -> str:
        """Hash of what decides a retraining: model, data, configuration, code, occasion."""
        data = self.plan.policy.data
        facts = {
            "champion": champion.digest,
            "recipe": config_hash(self.plan.recipe),
            "policy": self.plan.policy.facts(),
            "data": {str(path): sha256_of_file(path) for path in files_of(data.new)},
            "code": _code_digest(),
            "trigger": [finding.trigger, finding.occasion],
        }
        text = json.dumps(facts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _retraining(
        self,
        key: str,
        finding: Finding,
        found: list[Finding],
        champion: Version,
        mark: dict[str, Any],
    ) -> Retraining:
        fired = {one.trigger: {"said": one.said, **one.evidence} for one in found if one.fires}
        started = self.now().isoformat(timespec="seconds")
        trigger = f"{finding.trigger}: {finding.said}"
        return Retraining(key, trigger, fired, champion.name, started, seen=mark)

    # -- advancing -------------------------------------------------------------------------------

    def advance(self, one: Retraining) -> tuple[Retraining, int]:
        """Take a retraining as far as it goes; returns it with the exit code."""
        while one.is_open:
            if one.not_before and self.now() < datetime.fromisoformat(one.not_before):
                logger.info("Waiting until %s after a failure: %s", one.not_before, one.reason)
                return one, TRY_LATER
            try:
                one = STEPS[one.state](self, one)
            except StageStopped as stopped:
                logger.info("%s Run the same command again to go on.", stopped)
                return one, TRY_LATER
            except StageFailed as failure:
                one = self._failed(one, str(failure), failure.permanent)
            except InputError as error:
                one = self._failed(one, str(error), permanent=True)
            except OSError as error:
                one = self._failed(one, str(error), permanent=False)
        self.place(one).clean()
        return one, FAILED if one.state == "failed" else DONE

    def end(self, one: Retraining, state: State, said: str, **facts: Any) -> Retraining:
        """Bring a retraining to its end."""
        ended = self.now().isoformat(timespec="seconds")
        return self.store.move(one.knows(ended=ended, **facts), state, said)

    def _failed(self, one: Retraining, said: str, permanent: bool) -> Retraining:
        limits = self.plan.policy.limits
        one = replace(one, failures=one.failures + 1)
        if permanent or one.failures > limits.retries:
            self.registry.set_challenger(None, f"{one.key[:8]} failed")
            return self.end(one, "failed", said)
        wait = duration(limits.backoff) * 2 ** (one.failures - 1)
        until = (self.now() + wait).isoformat(timespec="seconds")
        return self.store.move(replace(one, not_before=until), one.state, said)


def _check_data(line: Line, one: Retraining) -> Retraining:
    place, data = line.place(one), line.plan.policy.data
    place.write_base()
    promoted = [other for other in line.store.retrainings() if other.state == "promoted"]
    sources = Sources(
        base=place.base,
        learned=[folder_of(line.plan.folder, other) / "data" / "new.parquet" for other in promoted],
        new=files_of(data.new),
        retention={
            name: files_of(gate.files) for name, gate in line.plan.policy.gate.retention.items()
        },
    )
    rows = mix(sources, place.columns, data.replay_share, one.key, place.data)
    one = one.knows(rows=rows)
    said = f"{rows['new']} new rows, {rows['replayed']} of {rows['old']} old ones"
    if rows["new"] < data.minimum_new_rows:
        return line.end(one, "rejected", f"{said}; needs {data.minimum_new_rows} new ones")
    return line.store.move(one, "data checked", said)


def _prepare(line: Line, one: Retraining) -> Retraining:
    run = line.place(one).write_config(line.registry.get(one.champion))
    return line.store.move(one.knows(run=str(run)), "training", str(run))


def _train(line: Line, one: Retraining) -> Retraining:
    place = line.place(one)
    place.train()
    return line.store.move(one, "evaluating", f"{place.challenger.model} is trained")


def _evaluate(line: Line, one: Retraining) -> Retraining:
    place, champion = line.place(one), line.registry.get(one.champion)
    place.evaluate_challenger()
    place.evaluate_champion(champion)
    version = line.registry.register(place.challenger, {"retraining": one.key})
    line.registry.set_challenger(version.name, f"judged against {champion.name}")
    verdict = _verdict(line, one, place)
    said = "passed" if verdict.passed else f"{len(verdict.against)} reasons against it"
    one = one.knows(version=version.name, verdict=verdict.to_json())
    return line.store.move(one, "gated", said)


def _verdict(line: Line, one: Retraining, place: Place) -> Verdict:
    """Compare and judge; runs that cannot be compared are a reason too."""
    gate = line.plan.policy.gate
    try:
        comparison = compare_runs(
            read_side(place.bench),
            read_side(place.challenger),
            retention=ranges_of(one),
            num_resamples=gate.num_resamples,
            confidence_level=gate.confidence_level,
        )
    except DataError as error:
        return Verdict((str(error),), ())
    write_json(place.folder / "comparison.json", comparison.to_json())
    is_sample_a_row = place.columns.label is not None
    return judge(comparison, gate, one.facts["rows"]["frozen"] if is_sample_a_row else None)


def _decide(line: Line, one: Retraining) -> Retraining:
    verdict, version = one.facts["verdict"], one.facts["version"]
    if not verdict["passed"]:
        line.registry.set_challenger(None, f"{version} was rejected")
        return line.end(one, "rejected", "; ".join(verdict["against"]))
    champion = line.registry.aliases().champion
    if champion not in (one.champion, version):
        line.registry.set_challenger(None, f"{version} was judged against {one.champion}")
        said = f"the champion is {champion} by now, it was judged against {one.champion}"
        return line.end(one, "rejected", said)
    line.registry.promote(version, f"retraining {one.key[:8]}", expected_champion=one.champion)
    return line.end(
        one, "promoted", f"{version} instead of {one.champion}", **_watch(line, version)
    )


def _watch(line: Line, version: str) -> dict[str, Any]:
    """What the watch over a new champion needs to know; nothing where there is none."""
    watch = line.plan.policy.watch
    if watch is None:
        return {}
    history = line.history(line.registry.get(version))
    after = max((window.id for window in read_windows(history)), default=0)
    until = (line.now() + duration(watch.within)).isoformat(timespec="seconds")
    return {"watch": {"history": str(history), "after": after, "until": until}}


STEPS: dict[State, Callable[[Line, Retraining], Retraining]] = {
    "triggered": _check_data,
    "data checked": _prepare,
    "training": _train,
    "evaluating": _evaluate,
    "gated": _decide,
}


def _code_digest() -> str:
    """sha256 over the sources that train and evaluate."""
    digest = hashlib.sha256()
    for path in sorted(_CODE.rglob("*")):
        if path.suffix in (".py", ".cpp"):
            digest.update(f"{path.relative_to(_CODE)}\0{sha256_of_file(path)}".encode())
    return digest.hexdigest()
