"""Coordinates into masks: keys and rows of the batch are in force, a site adds its positions.

What arrives here has been decided before: which site, which call, which rate. What leaves is the
masked tensor, the same for a sample whatever batch, padding or process it came in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pipeline.dropout.concrete import LearnedRates
from pipeline.dropout.decisions import drop_paths, dropped, dropped_steps, masked_channels
from pipeline.dropout.kernels import keyed_attention, keyed_rows
from pipeline.dropout.key import STEP_ROW_ID, signed
from pipeline.dropout.philox import NUM_LANES, scale, threshold
from pipeline.dropout.positions import StackInputs
from pipeline.dropout.schedules import Limits
from pipeline.dropout.shards import WHOLE, Shard
from pipeline.dropout.sites import SHARED, Site, is_cross_attention
from pipeline.dropout.variants import SHARED_POSITION, find_variant
from pipeline.errors import DropoutError

SiteCall = tuple[str, str, int]
"""(door, site, call)."""


@dataclass
class ActiveMasks:
    """The coordinates in force, and how often each site has been called in the current forward."""

    keys: dict[SiteCall, Tensor]
    """Key of every site in force, int64 `[1]`, or `[B]` when rows belong to several passes."""
    row_ids: Tensor
    """int64 `[B]`, or `[B, T]` for packed rows."""
    index: int | Sequence[int]
    """Optimizer step or Monte-Carlo pass; one number, or one a row."""
    purpose: str = "mc"
    """`train` or `mc`: learned rates have relaxed masks in training, hard ones afterwards."""
    limits: dict[SiteCall, Limits] = field(default_factory=dict)
    """Thresholds and scales of the sites whose rate is not the same for all rows and steps."""
    shards: Mapping[SiteCall, Shard] = field(default_factory=dict)
    """Where a slice begins, of the sites whose tensors this process holds a slice of."""
    counters: dict[tuple[str, str], int] = field(default_factory=dict)
    stacks: dict[str, StackInputs] = field(default_factory=dict)
    drawn: set[SiteCall] = field(default_factory=set)
    idle: set[SiteCall] = field(default_factory=set)
    """Inside layers left out whole: where such a layer runs all the same, these draw nothing."""
    depth: int = 0
    recomputing: bool = False

    def enter(self) -> None:
        """A module of the model is called; calls are counted anew in each outermost call."""
        if self.depth == 0:
            self.counters.clear()
            self.stacks.clear()
        self.depth += 1

    def leave(self) -> None:
        """That module has answered."""
        self.depth -= 1

    def next_call(self, door: str, site: str) -> int:
        """The number of this call of a site."""
        call = self.counters.get((door, site), 0)
        self.counters[door, site] = call + 1
        return call

    def snapshot(self) -> "ActiveMasks":
        """A copy from which a recompute draws the same masks again."""
        counters, stacks = dict(self.counters), dict(self.stacks)
        return replace(self, counters=counters, stacks=stacks, recomputing=True)


class SiteMask:
    """A planned site, with everything about its masks that does not change from call to call.

    Args:
        site: the site, as planned.
        stacks: names of the stacks around it, the nearest first.
    """

    def __init__(self, site: Site, stacks: tuple[str, ...]) -> None:
        self.site, self.stacks = site, stacks
        self.call: SiteCall = (site.door, site.site, site.call)
        t = threshold(site.rate)
        self.limits: Limits = torch.tensor([[t]]), torch.tensor([[scale(t)]], dtype=torch.float32)
        self.variant = find_variant(site.variant)
        self.is_cross_attention = is_cross_attention(site.site)
        self.has_positions = len(site.shape) > 1
        self.is_shared = site.layout == SHARED
        self.learned: tuple[LearnedRates, int] | None = None
        """The learned rates and this site's place among them."""

    def apply(self, active: ActiveMasks, key: Tensor, x: Tensor) -> Tensor:
        """Mask one tensor.

        Args:
            active: rows and stacks in force.
            key: this call's key, int64 `[1]` or `[B]`.
            x: `[B x m, ..., D]`, or attention probabilities `[B, H, Q, K]` or `[B x H, Q, K]`.
        """
        num_rows = active.row_ids.shape[0]
        if self.is_shared:
            return self._shared(active, key, x)
        if x.shape[0] % num_rows:
            raise DropoutError(
                f"Site {self.site.site}: a tensor of shape {tuple(x.shape)} does not divide into "
                f"the {num_rows} rows of this batch; the sample axis cannot be found."
            )
        if self.variant.kernel == "scalar":
            return self._whole(active, key, x)
        if self.variant.kernel == "choice":
            return self._channels(active, key, x)
        is_attention = self.variant.kernel == "attention"
        return (self._attention if is_attention else self._rows)(active, key, x)

    def attended(self, active: ActiveMasks) -> Tensor | None:
        """Which tokens of the stack around the site are no padding, `[B, T]`; None: all of them."""
        inputs = None if self.is_shared else self._stack(active)
        return None if inputs is None else inputs.attention_mask

    def _shared(self, active: ActiveMasks, key: Tensor, x: Tensor) -> Tensor:
        """One mask for all samples of a step: `[..., D]` without an axis of samples."""
        if len(key.unique()) > 1:
            raise DropoutError(
                f"Site {self.site.site} has one mask for all samples of a batch, which cannot hold "
                "the rows of several passes. Run one pass at a time."
            )
        step = replace(active, row_ids=torch.tensor([signed(STEP_ROW_ID)]), stacks={})
        return self._rows(step, key[:1], x[None])[0]

    def _whole(self, active: ActiveMasks, key: Tensor, x: Tensor) -> Tensor:
        """One decision a sample (path) or a step (layer)."""
        rates = self.rates(active)
        if self.variant.whole_step:
            is_dropped = dropped_steps(key, rates).expand(len(active.row_ids))
            return x.masked_fill(is_dropped.to(x.device), 0.0)
        return drop_paths(x, dropped(key, active.row_ids, rates), rates)

    def _channels(self, active: ActiveMasks, key: Tensor, x: Tensor) -> Tensor:
        """Modality dropout over ones [B, C]: 0 where a channel is masked; nothing is scaled."""
        rates = torch.tensor([rate for _, rate in self.site.channels], dtype=torch.float64)
        return x.masked_fill(masked_channels(key, active.row_ids, rates).to(x.device), 0.0)

    def rates(self, active: ActiveMasks) -> Tensor:
        """The rate in force, float64 `[1]` or `[B]`."""
        if self.call in active.limits:
            return active.limits[self.call][0][:, 0].double() / NUM_LANES
        return torch.tensor([self.site.rate], dtype=torch.float64)

    def _rows(self, active: ActiveMasks, key: Tensor, x: Tensor) -> Tensor:
        B, D = active.row_ids.shape[0], x.shape[-1]
        x_BMD = x.reshape(B, -1, D)
        M = x_BMD.shape[1]
        positions = self._positions(active, M, x.device).expand(B, M)
        per_row = self._per_row(active, key, positions, M, x.device)
        first = self._shard(active).feature
        group = self.variant.group(first + D, self.site.block_size)
        if self.learned is not None and active.purpose == "train":
            rates, place = self.learned
            return rates.relaxed(place, x_BMD, per_row[:3], group, first).view(x.shape)
        if first:
            return _keyed_slice(x_BMD, per_row, group, first).view(x.shape)
        return keyed_rows(x_BMD, *per_row, group).view(x.shape)

    def _attention(self, active: ActiveMasks, key: Tensor, x: Tensor) -> Tensor:
        B, (Q, K) = active.row_ids.shape[0], x.shape[-2:]
        if x.dim() == 4 and x.shape[0] > B:
            return self._windows(active, key, x)
        ids, head = self.coordinates(active, key, Q, K, x.device)
        return keyed_attention(x.reshape(B, -1, Q, K), *ids, head).view(x.shape)

    def coordinates(
        self, active: ActiveMasks, key: Tensor, Q: int, K: int, device: torch.device
    ) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], int]:
        """What `keyed_attention` takes for probabilities `[B, H, Q, K]`, and their first head."""
        B = active.row_ids.shape[0]
        queries, keys = self._attention_positions(active, Q, K, device)
        per_row = self._per_row(active, key, queries.expand(B, Q), Q, device)
        return (*per_row[:3], keys.expand(B, K), *per_row[3:]), self._shard(active).head

    def _windows(self, active: ActiveMasks, key: Tensor, x: Tensor) -> Tensor:
        """Attention inside windows, `[B x m, H, Q, K]`: a window's number joins the position."""
        B, (Q, K) = active.row_ids.shape[0], x.shape[-2:]
        m = x.shape[0] // B
        nowhere = torch.zeros(B, 1, dtype=torch.int64, device=x.device)
        per_sample = self._per_row(active, key, nowhere, 1, x.device)
        keys, ids, _, t, s = (p.repeat_interleave(m, 0).expand(-1, Q) for p in per_sample)
        window = torch.arange(m, device=x.device).repeat(B)[:, None]
        queries, places = (window * size + torch.arange(size).to(window) for size in (Q, K))
        return keyed_attention(x, keys, ids, queries, places, t, s, self._shard(active).head)

    def _per_row(
        self, active: ActiveMasks, key: Tensor, positions: Tensor, length: int, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Keys, row ids, positions, thresholds and scales, each `[B, length]`."""
        shape = (active.row_ids.shape[0], length)
        thresholds, scales = active.limits.get(self.call, self.limits)
        return (
            key.to(device)[:, None].expand(shape),
            _by_position(active.row_ids.to(device), length),
            positions,
            thresholds.to(device).expand(shape),
            scales.to(device).expand(shape),
        )

    def _positions(self, active: ActiveMasks, length: int, device: torch.device) -> Tensor:
        if self.variant.shared_position:
            return torch.full((1, 1), SHARED_POSITION, device=device)
        inputs = self._stack(active)
        first = self._shard(active).position if self.has_positions else 0
        if inputs is not None and length == inputs.length and self.has_positions:
            return inputs.queries(device, first)
        return torch.arange(first, first + length, device=device)[None]

    def _attention_positions(
        self, active: ActiveMasks, Q: int, K: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        inputs, shard = self._stack(active), self._shard(active)
        first_key = shard.key or 0
        if inputs is None or inputs.length != Q:
            queries = torch.arange(shard.position, shard.position + Q, device=device)[None]
            own_keys = Q == K and shard.key is None
        else:
            queries = inputs.queries(device, shard.position)
            if self.is_cross_attention:
                return queries, inputs.encoder_keys(K, device) + first_key
            if shard.key is None and K != Q:
                return queries, inputs.keys(K, device)
            own_keys = shard.key is None
        if own_keys:
            return queries, queries
        return queries, torch.arange(first_key, first_key + K, device=device)[None]

    def _shard(self, active: ActiveMasks) -> Shard:
        return active.shards.get(self.call, WHOLE)

    def _stack(self, active: ActiveMasks) -> StackInputs | None:
        return next((active.stacks[n] for n in self.stacks if n in active.stacks), None)


def _keyed_slice(x: Tensor, per_row: tuple[Tensor, ...], group: int, first: int) -> Tensor:
    """Rows `[B, M, D]` whose first feature has this number.

    A feature has the counter and lane that a key position of its number has, under head 0; key
    positions may begin anywhere.
    """
    places = torch.arange(first, first + x.shape[2], device=x.device)[None] // group
    keys, ids, positions, thresholds, scales = per_row
    columns = places.expand(x.shape[0], -1)
    return keyed_attention(x[:, None], keys, ids, positions, columns, thresholds, scales)[:, 0]


def _by_position(row_ids: Tensor, length: int) -> Tensor:
    if row_ids.dim() == 1:
        return row_ids[:, None].expand(-1, length)
    if row_ids.shape[1] != length:
        raise DropoutError(
            f"Packed row ids have {row_ids.shape[1]} positions, the masked tensor {length}."
        )
    return row_ids
