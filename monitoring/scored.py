"""Windows of scored rows: read from parquet, CSV or JSON lines, joined with labels, and checked.

Scored rows are what `masklock score` writes, or rows with the same columns that production scored
itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

if TYPE_CHECKING:
    from monitoring.profile import ReferenceProfile

SCORED_SCHEMA = "masklock-scored-v1"
METADATA_KEY = b"masklock"


@dataclass(frozen=True, eq=False)
class Window:
    """N scored rows that are judged together."""

    table: pa.Table
    paths: tuple[Path, ...]
    sha256: str
    """Of the bytes of the files, labels left out: labels that come later leave it as it is."""
    metadata: Mapping[str, Any]
    """What the scoring wrote beside the rows; empty for rows that production scored itself."""

    @property
    def num_rows(self) -> int:
        """N."""
        return int(self.table.num_rows)

    @property
    def model_version(self) -> str | None:
        """The model that scored the rows; None where the rows do not say."""
        raise NotImplementedError

    def has(self, name: str) -> bool:
        """Whether there is a column of this name."""
        return name in self.table.column_names

    def numbers(self, name: str) -> NDArray[np.float64]:
        """A numeric (or true/false) column as float64 [N], NaN where there is no value."""
        raise NotImplementedError

    def embeddings(self) -> NDArray[np.float32] | None:
        """Embeddings [N, D]; None where the rows have none."""
        raise NotImplementedError

    def labels(self) -> list[str | None]:
        """The label of each row, None where there is none (yet)."""
        raise NotImplementedError


def read_window(paths: Sequence[Path], labels: Sequence[Path] = ()) -> Window:
    """One window from its files, in their order.

    Args:
        paths: parquet, CSV or JSON lines of scored rows.
        labels: files of `sample_id` and `label`, for labels that arrive later.

    Raises:
        DataError: a file cannot be read, files contradict each other, or labels do.
    """
    raise NotImplementedError


def require_matches(window: Window, profile: "ReferenceProfile") -> None:
    """Refuse a window that cannot be compared with the reference.

    Raises:
        DataError: every problem at once.
    """
    raise NotImplementedError
