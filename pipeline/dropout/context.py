"""Keyed dropout bound to a model: inside a context every planned site draws its mask from named coordinates.

A context names purpose, index (step or Monte-Carlo pass) and the rows of the batch, and covers forward *and*
backward. Without one, sites are the identity in eval mode and an error in training mode: nothing draws in secret.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.dropout import doors
from pipeline.dropout.kernels import keyed_attention, keyed_rows
from pipeline.dropout.key import derive_key
from pipeline.dropout.philox import scale, threshold
from pipeline.dropout.plan import DropoutPlan
from pipeline.dropout.positions import StackInputs, is_stack
from pipeline.dropout.sites import Site, is_cross_attention
from pipeline.dropout.variants import SHARED_POSITION, find_variant
from pipeline.errors import DropoutError, LeakError


@dataclass
class ActiveMasks:
    """The coordinates in force, and how often each site has been called in the current forward pass."""

    keys: dict[tuple[str, str, int], Tensor]
    """Key of every site in force, int64 `[1]`, or `[B]` when rows belong to several passes."""
    row_ids: Tensor
    """int64 `[B]`, or `[B, T]` for packed rows."""
    counters: dict[tuple[str, str], int] = field(default_factory=dict)
    stacks: dict[str, StackInputs] = field(default_factory=dict)
    drawn: set[tuple[str, str, int]] = field(default_factory=set)
    depth: int = 0
    recomputing: bool = False

    def enter(self) -> None:
        if self.depth == 0:
            self.counters.clear()
            self.stacks.clear()
        self.depth += 1

    def leave(self) -> None:
        self.depth -= 1

    def next_call(self, door: str, site: str) -> int:
        call = self.counters.get((door, site), 0)
        self.counters[door, site] = call + 1
        return call

    def snapshot(self) -> "ActiveMasks":
        """A copy from which a recompute draws the same masks again."""
        return replace(
            self, counters=dict(self.counters), stacks=dict(self.stacks), recomputing=True
        )


class _SiteMask:
    """A planned site, with everything about its masks that does not change from call to call."""

    def __init__(self, site: Site, stacks: tuple[str, ...]) -> None:
        self.site = site
        self.stacks = stacks
        t = threshold(site.rate)
        self.threshold = torch.tensor([[t]], dtype=torch.int64)
        self.scale = torch.tensor([[scale(t)]], dtype=torch.float32)
        self.variant = find_variant(site.variant)
        self.is_cross_attention = is_cross_attention(site.site)


class KeyedDropout:
    """Opens a model's doors and draws every planned mask by key.

    Args:
        model: any (peft-wrapped) module; changed in place, `release()` undoes it.
        plan: which sites are live, and their rates; its rate decides, never the call's.
        seed: the run's seed, 0 .. 2**64 - 1.

    Raises:
        DropoutError: a planned site is not in this model.
    """

    def __init__(self, model: nn.Module, plan: DropoutPlan, seed: int) -> None:
        self.model, self.plan, self.seed = model, plan, seed
        self._local = threading.local()
        self._names = doors.site_names(model)
        self._check(plan)
        self._live = self._site_masks(plan)
        self._known = {(site.door, site.site, site.call) for site in plan.sites}
        self._checkpointed = [m for m in self._names if hasattr(m, "gradient_checkpointing")]
        functional = {site.site for site in plan.sites if site.door == doors.FUNCTIONAL}
        self._functional = {m: name for m, name in self._names.items() if name in functional}
        inserted = {site.site for site in plan.sites if site.door == doors.INSERTED}
        self._undo = [
            doors.open_modules(self._names, self._draw),
            doors.open_inserted(self._names, inserted, self._draw),
            self._watch_calls({site.site for site in plan.sites}),
        ]

    def release(self) -> None:
        """Close every door; the model is as it was."""
        for undo in reversed(self._undo):
            undo()
        self._undo = []

    @contextmanager
    def context(
        self, *, purpose: str, index: int | Sequence[int], row_ids: Tensor
    ) -> Iterator[ActiveMasks]:
        """Draw masks for these rows until the block ends; covers forward and backward.

        Args:
            purpose: `train` or `mc` (masks.md: separate streams).
            index: optimizer step or Monte-Carlo pass; one number, or one a row (passes stacked on the batch axis).
            row_ids: int64 `[B]`, stable sample ids (`[B, T]` for packed rows).
        """
        doors.wrap_checkpointing(self._checkpointed, self._segment)
        active = ActiveMasks(self._keys(purpose, index), row_ids)
        with self._pushed(active):
            yield active

    def missing(self, active: ActiveMasks) -> list[str]:
        """Planned sites that have not drawn in a context, as `site#call`."""
        return [f"{key[1]}#{key[2]}" for key in self._live if key not in active.drawn]

    # -- opening ------------------------------------------------------------------------------------------------

    def _check(self, plan: DropoutPlan) -> None:
        present = set(self._names.values())
        absent = sorted({s.site for s in plan.sites if s.in_force} - present)
        if absent:
            raise DropoutError(
                f"The dropout plan has {len(absent)} site(s) that this model lacks: {', '.join(absent[:5])}. "
                "The plan was made for another model: delete the run folder, or use the configuration it came from."
            )
        dropouts = {n for m, n in self._names.items() if isinstance(m, nn.Dropout)}
        wrong = [s.site for s in plan.in_force(doors.MODULE) if s.site not in dropouts]
        if wrong:
            raise DropoutError(
                f"Planned dropout modules are missing from the model (it was built with rate 0): {wrong[:5]}."
            )

    def _site_masks(self, plan: DropoutPlan) -> dict[tuple[str, str, int], _SiteMask]:
        stacks = [name for module, name in self._names.items() if is_stack(module)]
        result = {}
        for site in plan.in_force():
            around = [n for n in stacks if not n or site.site == n or site.site.startswith(n + ".")]
            nearest = tuple(sorted(around, key=len, reverse=True))
            result[site.door, site.site, site.call] = _SiteMask(site, nearest)
        return result

    def _watch_calls(self, sites: set[str]) -> Callable[[], None]:
        """Hooks that count nesting and read positions, on the ancestors of sites and on the stacks."""
        handles = []
        for module, name in self._names.items():
            prefix = name + "." if name else ""
            if is_stack(module) or any(site.startswith(prefix) for site in sites if site != name):
                handles.append(
                    module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True)
                )
                handles.append(module.register_forward_hook(self._leave, always_call=True))

        def undo() -> None:
            for handle in handles:
                handle.remove()

        return undo

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        active = self._active()
        if active is None:
            return
        active.enter()
        if is_stack(module):
            inputs = StackInputs.of(module, args, kwargs)
            if inputs is not None:
                active.stacks[self._names[module]] = inputs

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        active = self._active()
        if active is not None:
            active.leave()

    # -- one context --------------------------------------------------------------------------------------------

    def _active(self) -> ActiveMasks | None:
        return getattr(self._local, "active", None)

    @contextmanager
    def _pushed(self, active: ActiveMasks) -> Iterator[None]:
        previous = self._active()
        self._local.active = active
        try:
            with doors.open_functional(self._find):
                yield
        finally:
            self._local.active = previous

    def _find(self, module: nn.Module) -> tuple[str, doors.Draw] | None:
        name = self._functional.get(module)
        return None if name is None else (name, self._draw)

    def _keys(self, purpose: str, index: int | Sequence[int]) -> dict[Any, Tensor]:
        indices = [index] if isinstance(index, int) else list(index)
        unique = sorted(set(indices))
        place = torch.tensor([unique.index(i) for i in indices])
        result = {}
        for key, mask in self._live.items():
            site = mask.site
            values = [
                derive_key(self.seed, purpose, i, site.variant, site.site, site.call)
                for i in unique
            ]
            signed = [v - (1 << 64) if v >> 63 else v for v in values]
            tensor = torch.tensor(signed, dtype=torch.int64)
            result[key] = tensor if len(indices) == 1 else tensor[place]
        return result

    def _segment(self, body: Callable) -> Callable:
        """A checkpointed segment: the first run draws as always, its recompute from the captured state."""
        active = self._active()
        if active is None:
            return body
        state = active.snapshot()
        ran = False

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal ran
            if not ran:
                ran = True
                return body(*args, **kwargs)
            with self._pushed(state.snapshot()):
                return body(*args, **kwargs)

        return run

    # -- one draw -----------------------------------------------------------------------------------------------

    def _draw(self, door: str, site: str, x: Tensor, rate: float) -> Tensor:
        active = self._active()
        if active is None:
            return self._without_context(site, x, rate)
        key = (door, site, active.next_call(door, site))
        mask = self._live.get(key)
        if mask is None:
            if key not in self._known and rate > 0 and self.model.training:
                raise LeakError(
                    f"Site {site}#{key[2]} dropped with rate {rate} but is not in the dropout plan; "
                    "`masklock plan` lists what is."
                )
            return x
        if doors.in_backward() and not active.recomputing:
            raise LeakError(
                f"Site {site}#{key[2]} draws inside backward, in a recompute that was not captured; use the model's "
                "own gradient checkpointing (train.gradient_checkpointing)."
            )
        active.drawn.add(key)
        return self._apply(mask, active, active.keys[key], x)

    def _without_context(self, site: str, x: Tensor, rate: float) -> Tensor:
        if rate > 0 and self.model.training:
            raise LeakError(
                f"Site {site} was asked to drop outside a mask context. Wrap forward and backward in "
                "`keyed.context(...)`, or call model.eval()."
            )
        return x

    def _apply(self, mask: _SiteMask, active: ActiveMasks, keys: Tensor, x: Tensor) -> Tensor:
        num_rows = active.row_ids.shape[0]
        if x.shape[0] % num_rows:
            raise DropoutError(
                f"Site {mask.site.site}: a tensor of shape {tuple(x.shape)} does not divide into the {num_rows} "
                "rows of this batch; the sample axis cannot be found."
            )
        if mask.variant.kernel == "attention":
            return self._attention(mask, active, keys, x)
        return self._rows(mask, active, keys, x)

    def _rows(self, mask: _SiteMask, active: ActiveMasks, keys: Tensor, x: Tensor) -> Tensor:
        B, D = active.row_ids.shape[0], x.shape[-1]
        view = x.reshape(B, -1, D)
        M = view.shape[1]
        positions = self._positions(mask, active, M, x)
        out = keyed_rows(
            view,
            keys.to(x.device)[:, None].expand(B, M),
            _rows_by_position(active.row_ids.to(x.device), M),
            positions.expand(B, M),
            mask.threshold.to(x.device).expand(B, M),
            mask.scale.to(x.device).expand(B, M),
            mask.variant.group(D, 1),
        )
        return out.view(x.shape)

    def _positions(self, mask: _SiteMask, active: ActiveMasks, M: int, x: Tensor) -> Tensor:
        if mask.variant.shared_position:
            return torch.full((1, 1), SHARED_POSITION, device=x.device)
        inputs = self._stack(mask, active)
        if inputs is not None and M == inputs.length and x.dim() > 2:
            return inputs.queries(x.device)
        return torch.arange(M, device=x.device)[None]

    def _attention(self, mask: _SiteMask, active: ActiveMasks, keys: Tensor, x: Tensor) -> Tensor:
        B, (Q, K) = active.row_ids.shape[0], x.shape[-2:]
        view = x.reshape(B, -1, Q, K)
        queries, keys_at = self._attention_positions(mask, active, Q, K, x.device)
        out = keyed_attention(
            view,
            keys.to(x.device)[:, None].expand(B, Q),
            _rows_by_position(active.row_ids.to(x.device), Q),
            queries.expand(B, Q),
            keys_at.expand(B, K),
            mask.threshold.to(x.device).expand(B, Q),
            mask.scale.to(x.device).expand(B, Q),
        )
        return out.view(x.shape)

    def _attention_positions(
        self, mask: _SiteMask, active: ActiveMasks, Q: int, K: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        inputs = self._stack(mask, active)
        if inputs is None or inputs.length != Q:
            return torch.arange(Q, device=device)[None], torch.arange(K, device=device)[None]
        if mask.is_cross_attention:
            return inputs.queries(device), inputs.encoder_keys(K, device)
        return inputs.queries(device), inputs.keys(K, device)

    @staticmethod
    def _stack(mask: _SiteMask, active: ActiveMasks) -> StackInputs | None:
        return next((active.stacks[n] for n in mask.stacks if n in active.stacks), None)


def _rows_by_position(row_ids: Tensor, length: int) -> Tensor:
    if row_ids.dim() == 1:
        return row_ids[:, None].expand(-1, length)
    if row_ids.shape[1] != length:
        raise DropoutError(
            f"Packed row ids have {row_ids.shape[1]} positions, the masked tensor {length}."
        )
    return row_ids
