"""The files of a run folder: where they are, and how they are written so that no crash tears them.

Whole files are written beside their place, flushed to the disk and renamed. JSON lines are appended
with one write each; a torn line is passed over by readers and cut off by the next append.
"""

import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import RunFolderError

_write_numbers = itertools.count()


@dataclass(frozen=True)
class RunFolder:
    """Where each stage leaves its part of one run. Names places only; nothing is created."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    @property
    def config(self) -> Path:
        """The resolved configuration, complete, without secrets."""
        return self.path / "config.yaml"

    @property
    def plan(self) -> Path:
        """Every dropout site, in force or not."""
        return self.path / "plan.json"

    @property
    def labels(self) -> Path:
        """Names of the classes, in the order of the model's outputs."""
        return self.path / "labels.json"

    @property
    def quarantine(self) -> Path:
        """Samples that could not be used, one a line: split, sample_id, reason."""
        return self.path / "quarantine.jsonl"

    @property
    def metrics(self) -> Path:
        """History of the training, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def model(self) -> Path:
        """Final weights in Hugging Face format."""
        return self.path / "model"

    @property
    def evaluation(self) -> Path:
        """Folder of the evaluation stage."""
        return self.path / "evaluation"

    @property
    def report_json(self) -> Path:
        """Numbers of the evaluation stage."""
        return self.evaluation / "report.json"

    @property
    def samples(self) -> Path:
        """One row a sample."""
        return self.evaluation / "samples.parquet"

    @property
    def report_html(self) -> Path:
        """The report, one self-contained file."""
        return self.path / "report.html"

    @property
    def monitor_html(self) -> Path:
        """What production did, one self-contained file."""
        return self.path / "monitor.html"

    @property
    def profile(self) -> Path:
        """The reference profile that production is compared with."""
        return self.path / "profile"

    @property
    def monitoring(self) -> Path:
        """History of production windows, and alerts."""
        return self.path / "monitoring"

    @property
    def wandb(self) -> Path:
        """Files of the Weights & Biases run."""
        return self.path / "wandb"

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint after this optimizer step."""
        return self.path / f"checkpoint-{step}"


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a whole file or nothing: after a crash the old content stands, or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}-{next(_write_numbers)}.tmp")
    try:
        with open(unfinished, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    flush(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, obj: Any) -> None:
    """`write_bytes` of indented JSON; non-finite numbers become null."""
    write_text(path, json.dumps(_plain(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """`write_bytes` of one record a line."""
    write_bytes(path, b"".join(_line(row) for row in rows))


def append_jsonl(path: str | Path, record: Mapping[str, Any]) -> None:
    """Append one record as one line with one write; non-finite numbers become null.

    The line survives the death of the process at once, a power cut once the system has flushed it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = _line(record)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        end = _mend_end(descriptor)
        if (written := os.write(descriptor, line)) != len(line):
            os.ftruncate(descriptor, end)
            raise OSError(f"only {written} of {len(line)} bytes went to {path}: the disk is full")
    finally:
        os.close(descriptor)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """All whole records. A torn last line is passed over; a broken line before it is an error."""
    lines = Path(path).read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        record = _parse_line(line)
        if record is not None:
            records.append(record)
        elif line.strip() and number < len(lines):
            raise RunFolderError(
                f"{path}, line {number}: expected one JSON object, found {_shown(line)}. "
                f"Delete that line to go on without it."
            )
    return records


def sha256_of_file(path: str | Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mend_end(descriptor: int) -> int:
    """Give a whole last line its newline, cut a torn one off; return the new size."""
    size = os.fstat(descriptor).st_size
    if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
        return size
    data = os.pread(descriptor, size, 0)
    start = data.rfind(b"\n") + 1
    if _parse_line(data[start:]) is None:
        os.ftruncate(descriptor, start)
        return start
    return size + os.write(descriptor, b"\n")


def _line(record: Mapping[str, Any]) -> bytes:
    """One record as the bytes of one line."""
    text = json.dumps(_plain(record), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8") + b"\n"


def _parse_line(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line, or None."""
    try:
        record = json.loads(line)
    except ValueError:  # JSONDecodeError and UnicodeDecodeError are both of this kind
        return None
    return record if isinstance(record, dict) else None


def _shown(line: bytes) -> str:
    """The beginning of a broken line, for a message."""
    return repr(line[:60].decode("utf-8", errors="replace")) + ("..." if len(line) > 60 else "")


def _plain(value: Any) -> Any:
    """The same value out of JSON's own types; numpy and torch numbers by their `tolist`."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    raise TypeError(f"cannot write {value!r} ({type(value).__name__}) as JSON")
