"""The files of a profile: profile.json, arrays.npz and sample.parquet, each with its hash.

profile.json is written last: whatever crash came before, its hashes tell.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from monitoring.exact_sums import ExactSum
from monitoring.summaries import CalibrationBins, ClassSums, NumericSummary
from pipeline.errors import RunFolderError
from pipeline.records import write_bytes, write_json

PROFILE_SCHEMA = "masklock-profile-v1"
JSON, ARRAYS, SAMPLE = "profile.json", "arrays.npz", "sample.parquet"
_PLAIN = ("model_version", "task", "num_mc_passes", "num_rows", "columns", "categories")

Arrays = dict[str, NDArray[Any]]


def write_parts(folder: Path, parts: Mapping[str, Any]) -> None:
    """Write the fields of a ReferenceProfile."""
    arrays: Arrays = {}
    content = {
        **{name: parts[name] for name in (*_PLAIN, "label_names", "own_columns")},
        "numbers": _numbers_out(parts["numbers"], arrays),
        "classes": _classes_out(parts["classes"], arrays),
        "calibration": _calibration_out(parts["calibration"], arrays),
    }
    if parts["moment"] is not None:
        _sum_out("moment", _upper(parts["moment"]), arrays)
    files = {ARRAYS: _npz(arrays), SAMPLE: _parquet(parts["sample"])}
    for name, data in files.items():
        write_bytes(folder / name, data)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    profile = {"schema": PROFILE_SCHEMA, "files": hashes, "profile": content}
    write_json(folder / JSON, profile | {"sha256": _digest(profile)})


def read_parts(folder: Path, model_version: str | None) -> dict[str, Any]:
    """The fields of a ReferenceProfile, verified; see `monitoring.profile.read_profile`."""
    content, arrays, sample = _verified(folder)
    if model_version not in (None, content["model_version"]):
        raise RunFolderError(
            f"The profile in {folder} is of model {content['model_version']}, but the run's model "
            f"is now {model_version}. Evaluate it again: masklock evaluate {folder.parent}"
        )
    names = content["label_names"]
    return {
        **{name: content[name] for name in _PLAIN},
        "label_names": None if names is None else tuple(names),
        "own_columns": tuple(content["own_columns"]),
        "numbers": _numbers_in(content["numbers"], arrays),
        "classes": _classes_in(content["classes"], arrays),
        "calibration": _calibration_in(content["calibration"], arrays),
        "moment": _square(_sum_in("moment", arrays)) if "moment.high" in arrays else None,
        "sample": sample,
    }


# -- verified reading ----------------------------------------------------------------------------


def _verified(folder: Path) -> tuple[dict[str, Any], Arrays, pa.Table]:
    again = f"Evaluate the run again: masklock evaluate {folder.parent}"
    if not (folder / JSON).is_file():
        raise RunFolderError(f"There is no reference profile in {folder}. {again}")
    try:
        profile = json.loads((folder / JSON).read_text(encoding="utf-8"))
        schema = profile["schema"]
    except (ValueError, TypeError, KeyError) as error:
        raise RunFolderError(f"{folder / JSON} is damaged: {error!r}. {again}") from error
    if schema != PROFILE_SCHEMA:
        raise RunFolderError(
            f"The profile in {folder} has the schema {schema!r}, this version of Masklock reads "
            f"{PROFILE_SCHEMA!r}. {again}"
        )
    found = {name: _bytes_of(folder / name) for name in (ARRAYS, SAMPLE)}
    damaged = [
        name
        for name, data in found.items()
        if hashlib.sha256(data).hexdigest() != profile.get("files", {}).get(name)
    ]
    if profile.pop("sha256", None) != _digest(profile):
        damaged.append(JSON)
    if damaged:
        raise RunFolderError(
            f"The profile in {folder} is damaged: {', '.join(damaged)} is missing or not what "
            f"was written. {again}"
        )
    with np.load(io.BytesIO(found[ARRAYS]), allow_pickle=False) as arrays:
        return profile["profile"], dict(arrays), pq.read_table(pa.BufferReader(found[SAMPLE]))


def _bytes_of(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _digest(profile: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(profile, sort_keys=True).encode()).hexdigest()


def _npz(arrays: Arrays) -> bytes:
    buffer = io.BytesIO()
    named: dict[str, Any] = dict(arrays)
    np.savez_compressed(buffer, **named)
    return buffer.getvalue()


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


# -- each part, to JSON and arrays, and back -----------------------------------------------------


def _sum_out(name: str, total: ExactSum, arrays: Arrays) -> None:
    arrays |= {f"{name}.high": total.high, f"{name}.low": total.low}


def _sum_in(name: str, arrays: Arrays) -> ExactSum:
    return ExactSum(arrays[f"{name}.high"], arrays[f"{name}.low"])


def _numbers_out(numbers: Mapping[str, NumericSummary], arrays: Arrays) -> dict[str, Any]:
    """Histograms go to arrays by place: names of the user's columns stay out of a zip file."""
    content = {}
    for place, (name, one) in enumerate(numbers.items()):
        arrays[f"counts.{place}"] = one.counts
        content[name] = {
            "grid": one.grid,
            "count": one.count,
            "missing": one.missing,
            "sum": [float(one.total.high), float(one.total.low)],
            "minimum": one.minimum if one.count else None,
            "maximum": one.maximum if one.count else None,
        }
    return content


def _numbers_in(content: Mapping[str, Any], arrays: Arrays) -> dict[str, NumericSummary]:
    return {
        name: NumericSummary(
            grid=one["grid"],
            count=one["count"],
            missing=one["missing"],
            total=ExactSum(*(np.array(part, dtype=np.float64) for part in one["sum"])),
            minimum=np.inf if one["minimum"] is None else one["minimum"],
            maximum=-np.inf if one["maximum"] is None else one["maximum"],
            counts=arrays[f"counts.{place}"],
        )
        for place, (name, one) in enumerate(content.items())
    }


def _classes_out(classes: ClassSums | None, arrays: Arrays) -> list[str] | None:
    if classes is None:
        return None
    arrays["classes.counts"] = classes.counts
    _sum_out("classes", classes.sums, arrays)
    return list(classes.names)


def _classes_in(names: list[str] | None, arrays: Arrays) -> ClassSums | None:
    if names is None:
        return None
    return ClassSums(tuple(names), arrays["classes.counts"], _sum_in("classes", arrays))


def _calibration_out(bins: CalibrationBins | None, arrays: Arrays) -> bool:
    if bins is None:
        return False
    arrays |= {"calibration.count": bins.count, "calibration.correct": bins.correct}
    _sum_out("calibration", bins.confidence, arrays)
    return True


def _calibration_in(is_there: bool, arrays: Arrays) -> CalibrationBins | None:
    if not is_there:
        return None
    count, correct = arrays["calibration.count"], arrays["calibration.correct"]
    return CalibrationBins(count, _sum_in("calibration", arrays), correct)


def _upper(square: ExactSum) -> ExactSum:
    """A symmetric matrix is kept as its upper triangle."""
    places = np.triu_indices(len(square.high))
    return ExactSum(square.high[places], square.low[places])


def _square(upper: ExactSum) -> ExactSum:
    size = int((np.sqrt(8 * len(upper.high) + 1) - 1) / 2)
    places = np.triu_indices(size)

    def mirrored(values: NDArray[np.float64]) -> NDArray[np.float64]:
        square = np.zeros((size, size))
        square[places] = values
        return square + np.triu(square, 1).T

    return ExactSum(mirrored(upper.high), mirrored(upper.low))
