"""Samples that cannot be used: set aside with id and reason, as long as they are few.

Judged once, before the training's order is made, from the data alone: every process decides alike.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import DataError
from pipeline.modality.labels import row_list

NUM_SHOWN = 5


class BadSample(Exception):
    """One sample cannot be used; the message is the reason, without its id."""


@dataclass(frozen=True)
class SetAside:
    """A sample that is not used."""

    split: str
    sample_id: int
    reason: str

    def to_json(self) -> dict[str, Any]:
        """One line of quarantine.jsonl."""
        return {"split": self.split, "sample_id": self.sample_id, "reason": self.reason}


@dataclass
class Quarantine:
    """What was set aside so far, over all splits.

    Args:
        budget: largest share of a split's samples, 0 to 1.
    """

    budget: float
    set_aside: list[SetAside] = field(default_factory=list)

    def usable(
        self, split: str, samples: Iterable[Mapping[str, Any]], judge: Callable[[Any], Any]
    ) -> list[int]:
        """Places of the samples that `judge` does not refuse by `BadSample`.

        Args:
            split: whose they are.
            samples: prepared, with their `sample_id`.
            judge: the modality's, for this run.

        Raises:
            DataError: more than the budget are refused, with the reasons and examples.
        """
        good: list[int] = []
        refused: list[SetAside] = []
        for place, sample in enumerate(samples):
            try:
                judge(sample)
            except BadSample as error:
                refused.append(SetAside(split, sample["sample_id"], str(error)))
            else:
                good.append(place)
        if len(refused) > self.budget * (len(good) + len(refused)):
            raise DataError(self._too_many(split, refused, len(good) + len(refused)))
        self.set_aside += refused
        return good

    def notes(self) -> list[str]:
        """One sentence a split that lost samples."""
        counts = Counter(sample.split for sample in self.set_aside)
        return [f"{count} samples of {split} are set aside: see quarantine.jsonl"
                for split, count in counts.items()]  # fmt: skip

    def _too_many(self, split: str, refused: list[SetAside], total: int) -> str:
        by_reason: dict[str, list[int]] = {}
        for sample in refused:
            by_reason.setdefault(sample.reason, []).append(sample.sample_id)
        shown = list(by_reason.items())[:NUM_SHOWN]
        lines = "".join(f"\n  - {row_list(ids, 'sample')}: {why}" for why, ids in shown)
        more = f"\n  - ... ({len(refused)} in all)" if len(by_reason) > NUM_SHOWN else ""
        return (
            f"{split}: {len(refused)} of {total} samples cannot be used, more than "
            f"data.quarantine_budget allows ({self.budget:g}). Mend or remove them, or raise the "
            f"budget:{lines}{more}"
        )
