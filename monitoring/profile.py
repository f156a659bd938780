"""The reference profile: what the evaluation learned of its test rows, as sums that can be merged.

Profiles of parts of the rows, in any order, merge into the profile of the whole.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from monitoring.exact_sums import ExactSum
from monitoring.summaries import CalibrationBins, ClassSums, NumericSummary
from pipeline.records import RunFolder

PROFILE_SCHEMA = "masklock-profile-v1"
MAX_SAMPLE_ROWS = 2000


@dataclass(frozen=True, eq=False)
class ReferenceProfile:
    """Counts, sums, histograms and a keyed sample of N reference rows."""

    model_version: str
    task: str
    label_names: tuple[str, ...] | None
    """Classes of the model; None for tasks without."""
    num_rows: int
    columns: Mapping[str, str]
    """Type of every scored column, as Arrow names it."""
    own_columns: tuple[str, ...]
    """Those that the scoring itself adds; the others came with the user's rows."""
    numbers: Mapping[str, NumericSummary]
    categories: Mapping[str, Mapping[str, int]]
    """Counts by value: `prediction`, `label`, and text columns of the user."""
    classes: ClassSums | None
    """None without embeddings."""
    moment: ExactSum | None
    """Sum of x x^T over the embeddings, [D, D]; None without, and for more than 1,024 dimensions."""
    calibration: CalibrationBins | None
    """None without labels."""
    sample: pa.Table
    """At most 2,000 rows chosen by key: `sample_id`, every numeric column, `embedding` (float16)."""

    @property
    def second_moment(self) -> NDArray[np.float64] | None:
        """Sum of x x^T over the embeddings, [D, D]."""
        return None if self.moment is None else self.moment.high

    def sample_numbers(self, name: str) -> NDArray[np.float64]:
        """A numeric column of the sample, NaN where there is no value."""
        raise NotImplementedError

    def sample_embeddings(self) -> NDArray[np.float32] | None:
        """Embeddings of the sample, [K, D]."""
        raise NotImplementedError


def profile_of(table: pa.Table, *, model_version: str, num_bins: int = 15) -> ReferenceProfile:
    """The profile of scored rows."""
    raise NotImplementedError


def merge(first: ReferenceProfile, second: ReferenceProfile) -> ReferenceProfile:
    """The profile of the rows of both.

    Raises:
        DataError: they are of different models or columns, or share rows.
    """
    raise NotImplementedError


def write_profile(folder: RunFolder, profile: ReferenceProfile) -> None:
    """Write profile/: profile.json, arrays.npz, sample.parquet."""
    raise NotImplementedError


def read_profile(folder: RunFolder) -> ReferenceProfile:
    """Read it back, its hashes verified.

    Raises:
        RunFolderError: there is none, it is damaged, or of another schema version.
    """
    raise NotImplementedError
