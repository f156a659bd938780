"""The registry of models, on the file system: immutable versions, aliases that say which counts.

    <registry>/versions/<name>/   model, plan, profile, evaluation of a run; manifest.json: its sums
    <registry>/aliases.json       the truth about champion, challenger and previous: renamed whole
    <registry>/journal.jsonl      every change, one JSON object a line; mended from aliases.json
    <registry>/whole/<name>/      merged weights of an adapter that a retraining has started from

Nothing here needs a network. A version exists once its folder has its name.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.errors import RegistryError
from pipeline.locking import file_lock
from pipeline.records import (
    RunFolder,
    append_jsonl,
    flush,
    read_jsonl,
    sha256_of_file,
    write_json,
)

SCHEMA = "masklock-registry-v1"
ALIASES = ("champion", "challenger", "previous")
MANIFEST = "manifest.json"
_IDENTITY = ("config.yaml", "plan.json", "labels.json", "model/")
_PARTS = ("config.yaml", "plan.json", "labels.json", "model", "profile", "evaluation")
_NEEDED = ("config.yaml", "plan.json", "model")
_LOCK_SECONDS = 30.0
Clock = Callable[[], datetime]
Reach = Callable[[str], None]


def utc_now() -> datetime:
    """The present, with its time zone."""
    return datetime.now(UTC)


@dataclass(frozen=True)
class Version:
    """One registered model."""

    name: str
    folder: Path
    created: str
    digest: str
    """sha256 over the files that make the model: configuration, plan, labels, weights."""
    origin: Mapping[str, Any]
    """Where it came from: `run`, and what the caller added."""
    files: Mapping[str, str]
    """sha256 by path below the folder."""

    @property
    def run(self) -> RunFolder:
        """The version as a run folder that stages can read. Nothing may be written there."""
        return RunFolder(self.folder)

    def to_json(self) -> dict[str, Any]:
        """Everything but the sums."""
        own = {"name": self.name, "created": self.created, "digest": self.digest}
        return own | {"origin": dict(self.origin), "folder": str(self.folder)}


@dataclass(frozen=True)
class Aliases:
    """Which version each alias names, and the champions that came before."""

    number: int = 0
    """How many changes there have been."""
    champions: tuple[str, ...] = ()
    """All champions not rolled back, the present one last."""
    challenger: str | None = None
    change: Mapping[str, Any] | None = None
    """The last change, as the journal has it."""

    @property
    def champion(self) -> str | None:
        """The version in production."""
        return self.champions[-1] if self.champions else None

    @property
    def previous(self) -> str | None:
        """The version that a rollback returns to."""
        return self.champions[-2] if len(self.champions) > 1 else None

    def to_json(self) -> dict[str, Any]:
        """What aliases.json holds."""
        return {
            "schema": SCHEMA,
            "number": self.number,
            "champion": self.champion,
            "previous": self.previous,
            "challenger": self.challenger,
            "champions": list(self.champions),
            "change": self.change,
        }


class Registry:
    """A folder of versions.

    Args:
        folder: made by the first `register`.
        now: the clock of `created` and of the journal.
        reach: told the name of every point after which a kill leaves something behind; for tests.
    """

    def __init__(
        self, folder: Path, now: Clock = utc_now, reach: Reach = lambda point: None
    ) -> None:
        self.folder, self._now, self._reach = Path(folder), now, reach

    @property
    def versions_folder(self) -> Path:
        """Where versions are."""
        return self.folder / "versions"

    @property
    def journal_file(self) -> Path:
        """Every change."""
        return self.folder / "journal.jsonl"

    # -- reading ---------------------------------------------------------------------------------

    def aliases(self) -> Aliases:
        """What the aliases say now.

        Raises:
            RegistryError: the file cannot be read.
        """
        path = self.folder / "aliases.json"
        if not path.exists():
            return Aliases()
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            if read["schema"] != SCHEMA:
                raise ValueError(f"schema {read['schema']!r} instead of {SCHEMA!r}")
            champions = tuple(map(str, read["champions"]))
            return Aliases(int(read["number"]), champions, read["challenger"], read["change"])
        except (ValueError, KeyError, TypeError) as error:
            raise RegistryError(
                f"{path} was to say which version is the champion, but cannot be read ({error}). "
                f"Its last state is the last line of {self.journal_file}."
            ) from error

    def versions(self) -> list[Version]:
        """All versions, oldest first."""
        found = sorted(self.versions_folder.glob(f"[!.]*/{MANIFEST}"))
        return [_read_version(path.parent) for path in found]

    def get(self, name: str) -> Version:
        """A version by its name, or by an alias.

        Raises:
            RegistryError: there is none; says which there are.
        """
        aliases = self.aliases()
        wanted = getattr(aliases, name) if name in ALIASES else name
        if wanted is None:
            raise RegistryError(
                f"The registry {self.folder} has no {name} yet. {self._advice(aliases)}"
            )
        folder = self.versions_folder / wanted
        if Path(wanted).name != wanted or not (folder / MANIFEST).is_file():
            what = f"{name} ({wanted})" if name in ALIASES else wanted
            known = ", ".join(version.name for version in self.versions()) or "none"
            raise RegistryError(
                f"The version {what} was to be in {self.versions_folder}, but is not there. "
                f"There are: {known}."
            )
        return _read_version(folder)

    def journal(self) -> list[dict[str, Any]]:
        """Every change of the aliases, oldest first."""
        return read_jsonl(self.journal_file) if self.journal_file.exists() else []

    def verify(self, version: Version) -> None:
        """Compare every file with the sum it was registered with.

        Raises:
            RegistryError: all files that are missing, changed or new.
        """
        found = {path: sha256_of_file(version.folder / path) for path in _files(version.folder)}
        problems = [
            *(f"{path} is missing" for path in version.files if path not in found),
            *(f"{path} was added" for path in found if path not in version.files),
            *(
                f"{path} has changed"
                for path, digest in found.items()
                if version.files.get(path, digest) != digest
            ),
        ]
        if problems:
            listed = "\n".join(f"  - {problem}" for problem in problems)
            raise RegistryError(
                f"The version {version.name} is not what was registered:\n{listed}\n"
                "Restore these files, or delete the version's folder and register its run again."
            )

    # -- writing ---------------------------------------------------------------------------------

    def register(self, run: RunFolder, origin: Mapping[str, Any] | None = None) -> Version:
        """Keep a run as a version; the same model again is the version that is there.

        Weights are hard links where the file system allows it, everything else is copied.
        """
        if missing := [name for name in _NEEDED if not (run.path / name).exists()]:
            raise RegistryError(
                f"{run.path} was to be registered, but has no {', no '.join(missing)}. "
                "Register a run whose training has finished."
            )
        with self.locked():
            digest = _digest(_sums(run.path))
            for version in self.versions():
                if version.digest == digest:
                    return version
            return self._add(run, digest, dict(origin or {}))

    def set_challenger(self, name: str | None, reason: str = "") -> Aliases:
        """Name the version that is being compared with the champion, or none."""
        with self.locked():
            before = self.aliases()
            if name is not None:
                self.get(name)
            if before.challenger == name:
                return before
            return self._move(before, "challenger", before.champions, name, reason)

    def promote(self, name: str, reason: str = "", expected_champion: str | None = None) -> Aliases:
        """Make a version the champion, after its sums are verified; the champion becomes previous.

        Args:
            expected_champion: refuse if another version is the champion by now.
        """
        with self.locked():
            before = self.aliases()
            version = self.get(name)
            if before.champion == version.name:
                return before
            self._expect(before, expected_champion)
            self.verify(version)
            challenger = None if before.challenger == version.name else before.challenger
            champions = (*before.champions, version.name)
            return self._move(before, "promote", champions, challenger, reason)

    def rollback(self, reason: str = "", expected_champion: str | None = None) -> Aliases:
        """Return to the champion before this one, after its sums are verified."""
        with self.locked():
            before = self.aliases()
            self._expect(before, expected_champion)
            if before.previous is None:
                raise RegistryError(
                    f"There is no version before {before.champion or 'the first'} to roll back "
                    "to. Promote another version instead: masklock registry promote VERSION"
                )
            self.verify(self.get(before.previous))
            champions = before.champions[:-1]
            return self._move(before, "rollback", champions, before.challenger, reason)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Exclude every other writer, and finish what a killed one left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with file_lock(self.folder / ".lock", _LOCK_SECONDS, f"the registry {self.folder}"):
            self._recover()
            yield

    def _recover(self) -> None:
        """The change that aliases.json tells is the only one the journal can lack."""
        aliases = self.aliases()
        last = self.journal()[-1:]
        if aliases.change is not None and (not last or last[0]["number"] < aliases.number):
            append_jsonl(self.journal_file, aliases.change)
        for unfinished in self.versions_folder.glob(".unfinished-*"):
            shutil.rmtree(unfinished)

    def _move(
        self,
        before: Aliases,
        action: str,
        champions: tuple[str, ...],
        challenger: str | None,
        reason: str,
    ) -> Aliases:
        number = before.number + 1
        after = Aliases(number, champions, challenger)
        change = {"number": number, "at": self._now().isoformat(timespec="seconds")}
        change |= {"action": action, "reason": reason, "before": before.champion}
        change |= {alias: getattr(after, alias) for alias in ALIASES}
        after = Aliases(number, champions, challenger, change)
        write_json(self.folder / "aliases.json", after.to_json())
        self._reach(f"{action}: aliases moved")
        append_jsonl(self.journal_file, change)
        self._reach(f"{action}: journal written")
        return after

    def _add(self, run: RunFolder, digest: str, origin: dict[str, Any]) -> Version:
        numbers = [int(version.name[1:5]) for version in self.versions()]
        name = f"v{max(numbers, default=0) + 1:04d}-{digest[:8]}"
        unfinished = self.versions_folder / f".unfinished-{name}"
        for part in _PARTS:
            for path in _files_below(run.path, part):
                _keep(run.path / path, unfinished / path, share=part == "model")
        self._reach("register: files copied")
        version = Version(
            name=name,
            folder=self.versions_folder / name,
            created=self._now().isoformat(timespec="seconds"),
            digest=digest,
            origin={"run": str(run.path.resolve())} | origin,
            files={path: sha256_of_file(unfinished / path) for path in _files(unfinished)},
        )
        manifest = {"schema": SCHEMA} | version.to_json() | {"files": dict(version.files)}
        del manifest["folder"]
        write_json(unfinished / MANIFEST, manifest)
        os.replace(unfinished, version.folder)
        flush(self.versions_folder)
        _close(version.folder)
        self._reach("register: version named")
        return version

    def _expect(self, aliases: Aliases, champion: str | None) -> None:
        if champion is not None and aliases.champion != champion:
            raise RegistryError(
                f"The champion was to be {champion}, but is {aliases.champion} by now: somebody "
                "else has moved it. Nothing was changed; compare with the present champion."
            )

    def _advice(self, aliases: Aliases) -> str:
        if aliases.champion is None:
            return "Name one: masklock registry register RUN, then masklock registry promote."
        return f"The champion is {aliases.champion}."


def _close(folder: Path) -> None:
    """Nothing is added to or replaced in a version any more, by whoever is not root."""
    for inner in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        inner.chmod(inner.stat().st_mode & ~0o222)


def _read_version(folder: Path) -> Version:
    path = folder / MANIFEST
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        if read["schema"] != SCHEMA:
            raise ValueError(f"schema {read['schema']!r} instead of {SCHEMA!r}")
        return Version(
            read["name"], folder, read["created"], read["digest"], read["origin"], read["files"]
        )
    except (ValueError, KeyError, TypeError) as error:
        raise RegistryError(f"{path} cannot be read: {error}. Register the run again.") from error


def _files(folder: Path) -> list[str]:
    """Paths of the files below a version's folder, its manifest left out."""
    return [path for path in _files_below(folder, ".") if path != MANIFEST]


def _files_below(folder: Path, part: str) -> list[str]:
    start = folder / part
    found = [start] if start.is_file() else sorted(p for p in start.rglob("*") if p.is_file())
    return [path.relative_to(folder).as_posix() for path in found]


def _sums(folder: Path) -> dict[str, str]:
    """sha256 of the files that make the model."""
    parts = (part.rstrip("/") for part in _IDENTITY)
    paths = [path for part in parts for path in _files_below(folder, part)]
    return {path: sha256_of_file(folder / path) for path in paths}


def _digest(sums: Mapping[str, str]) -> str:
    text = json.dumps(sums, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _keep(source: Path, place: Path, share: bool) -> None:
    """Weights are large and never rewritten in place: they share the bytes of the run's file."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if share:
        with contextlib.suppress(OSError):
            os.link(source, place)
            return
    shutil.copyfile(source, place)
    flush(place)
