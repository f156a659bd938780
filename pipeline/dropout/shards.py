"""Where a process's slice lies in the whole, under tensor, sequence or context parallelism.

Masks are drawn by global features, heads and positions: a process that says where its slice begins
draws the slice of the mask that one process would draw.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipeline.dropout.sites import AUGMENTATION, Site
from pipeline.errors import DropoutError

MAX_FEATURES = 1 << 23
"""Features and key positions that the counter of a slice can hold."""


@dataclass(frozen=True)
class Shard:
    """The global coordinates at which this process's slice of a tensor begins.

    Tensor parallelism cuts features and heads, sequence and context parallelism positions. A batch
    that is padded, or whose tokens are not contiguous, brings global `position_ids` instead of a
    position. Cut samples need nothing: their ids are global already.
    """

    feature: int = 0
    """First feature of the slice; any number, not only multiples of 8 or of a block."""
    head: int = 0
    """First (query) head."""
    position: int = 0
    """First position, also of attention's queries."""
    key: int | None = None
    """First key position of attention; by default keys are the slice's own tokens where there are
    as many as queries, else all from 0."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value is not None and not 0 <= value < MAX_FEATURES:
                raise DropoutError(
                    f"A shard's {name} must lie between 0 and {MAX_FEATURES - 1}, but it is "
                    f"{value}. Give the global number of the slice's first one."
                )


WHOLE = Shard()
Shards = Shard | Mapping[str, Shard]
"""One slice for all sites, or one for each role: only some tensors are cut."""


def shards_by_site(
    shards: Shards | None, sites: Iterable[Site]
) -> dict[tuple[str, str, int], Shard]:
    """The slice at every site that is cut.

    Raises:
        DropoutError: a role that no site has, or a site whose draw needs the whole tensor.
    """
    if shards is None:
        return {}
    sites = list(sites)
    if isinstance(shards, Mapping) and (unknown := set(shards) - {site.role for site in sites}):
        roles = ", ".join(sorted({site.role for site in sites}))
        raise DropoutError(
            f"Shards are given for {', '.join(sorted(unknown))}, but no site in force has such a "
            f"role. Those in force: {roles}."
        )
    found = {}
    for site in sites:
        shard = shards.get(site.role, WHOLE) if isinstance(shards, Mapping) else shards
        if shard != WHOLE:
            _require_divisible(site, shard)
            found[site.door, site.site, site.call] = shard
    return found


def _require_divisible(site: Site, shard: Shard) -> None:
    is_window = site.variant == "attention" and len(site.shape) > 3
    cut = {"feature": shard.feature, "position": shard.position or shard.key}
    needs_whole = site.door in AUGMENTATION or (is_window and cut["position"])
    if needs_whole and any(cut.values()):
        raise DropoutError(
            f"Site {site.label} draws by the whole sequence ({site.role}), which a slice does not "
            "show. Apply it before the tensor is cut, or switch it off."
        )
