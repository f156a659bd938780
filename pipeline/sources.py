"""One `DataSource` to its splits (hub, files, saved, builtin), and what a split name means."""

from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.schema import DataSource
from pipeline.corpora import BUILTIN
from pipeline.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

BUILTIN_PREFIX = "builtin:"
FILE_FORMATS = ("parquet", "json", "csv", "text")
DEFAULT_SPLIT = "test"

Ranges = list[tuple[str, int, int]]


def load_splits(source: DataSource) -> "DatasetDict":
    """All splits of a source."""
    if source.path.startswith(BUILTIN_PREFIX):
        return _builtin(source.path)
    if _is_saved_folder(Path(source.path)):
        return _saved_folder(source.path)
    return _load_dataset(source)


def ranges_of(splits: "DatasetDict", expression: str, place: str) -> Ranges:
    """A split name or slice (`train[90%:]`, `train+test`) as (split, first row, row after last)."""
    from datasets import ReadInstruction

    sizes = {name: len(rows) for name, rows in splits.items()}
    try:
        parts = ReadInstruction.from_spec(expression).to_absolute(sizes)
    except ValueError as error:
        raise DataError(_unknown_split(expression, sizes, place)) from error
    return [(part.splitname, part.from_ or 0, _stop(part, sizes)) for part in parts]


def select(splits: "DatasetDict", ranges: Ranges) -> "Dataset":
    """The rows of some ranges, in their order."""
    from datasets import concatenate_datasets

    parts = [splits[name].select(range(start, stop)) for name, start, stop in ranges]
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def num_shared(first: Ranges, second: Ranges) -> int:
    """How many rows two selections from the same splits have in common."""
    return sum(
        max(0, min(a_stop, b_stop) - max(a_start, b_start))
        for a, a_start, a_stop in first
        for b, b_start, b_stop in second
        if a == b
    )


def default_split(splits: "DatasetDict", place: str) -> str:
    """Of a source with one split that one, else `test`."""
    if len(splits) == 1:
        return next(iter(splits))
    if DEFAULT_SPLIT in splits:
        return DEFAULT_SPLIT
    raise DataError(f"{place}: there are the splits {', '.join(splits)}; say which one to read.")


def _builtin(path: str) -> "DatasetDict":
    if path not in BUILTIN:
        near = get_close_matches(path, BUILTIN, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise DataError(f"There is no data set {path}. There are: {', '.join(BUILTIN)}.{hint}")
    return BUILTIN[path]()


def _is_saved_folder(path: Path) -> bool:
    markers = ("dataset_dict.json", "state.json")  # what `save_to_disk` writes
    return any((path / marker).is_file() for marker in markers)


def _saved_folder(path: str) -> "DatasetDict":
    from datasets import Dataset, DatasetDict, load_from_disk

    try:
        saved = load_from_disk(path)
    except (OSError, ValueError) as error:
        raise DataError(f"The saved data set {path} cannot be read: {error}") from error
    if isinstance(saved, Dataset):
        return DatasetDict({str(saved.split or "train"): saved})
    return saved


def _load_dataset(source: DataSource) -> "DatasetDict":
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(
            source.path,
            source.name,
            data_files=source.data_files,
            data_dir=source.data_dir,
            revision=source.revision,
        )
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(_not_loaded(source, error)) from error


def _not_loaded(source: DataSource, error: Exception) -> str:
    reason = error.__cause__ or error
    lines = [f"The data set {source.path!r} could not be loaded: {reason}", *_advice(source, error)]
    return "\n".join(lines)


def _advice(source: DataSource, error: Exception) -> list[str]:
    """What was looked for, and what to do about it."""
    path = Path(source.path)
    if path.is_file():
        kind = {".jsonl": "json", ".txt": "text", ".tsv": "csv"}.get(path.suffix, path.suffix[1:])
        kind = kind if kind in FILE_FORMATS else "|".join(FILE_FORMATS)
        return [f"It is a file: say data.path={kind} data.data_files={source.path}"]
    if source.path in FILE_FORMATS:
        files = source.data_files or source.data_dir or "none given: set data_files"
        return [f"Looked for these files: {files}"]
    if path.is_dir():
        return ["Looked for parquet, json, csv or text files in that folder."]
    if not isinstance(error, OSError):
        return []
    return [
        f"Looked for the folder {str(path.resolve())!r}, on the Hugging Face hub and in its cache.",
        "To work offline: load it once with a connection and then set HF_HUB_OFFLINE=1; or give a "
        "folder written by save_to_disk; or data.path=parquet|json|csv|text with data.data_files; "
        "or data.path=builtin:python-stdlib.",
    ]


def _unknown_split(expression: str, sizes: dict[str, int], place: str) -> str:
    existing = ", ".join(f"{name} ({size} rows)" for name, size in sizes.items())
    first = next(iter(sizes))
    return (
        f"{place}: there is no split {expression!r}. There are: {existing}. "
        f"Name one of them, or a part of one such as '{first}[90%:]'."
    )


def _stop(part: object, sizes: dict[str, int]) -> int:
    stop = part.to  # type: ignore[attr-defined]
    return sizes[part.splitname] if stop is None else stop  # type: ignore[attr-defined]
