"""Keyed dropout bound to a model: inside a context every planned site draws its mask by key.

A context names purpose, index (step or Monte-Carlo pass) and the rows of the batch, and covers
forward *and* backward. Without one, sites are the identity in eval mode and an error in training
mode: nothing draws in secret.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.dropout import doors
from pipeline.dropout.attention import open_attention
from pipeline.dropout.concrete import LearnedRates, learned_rates_of
from pipeline.dropout.jitter import open_jitter
from pipeline.dropout.key import derive_keys, signed
from pipeline.dropout.layer_drop import LAYER, open_layers, stacks_keep_layers
from pipeline.dropout.masks import ActiveMasks, SiteCall, SiteMask
from pipeline.dropout.modality import open_modality
from pipeline.dropout.noise import NOISE, JitterMask, NoiseMask
from pipeline.dropout.plan import DropoutPlan
from pipeline.dropout.positions import StackInputs, fixes_positions
from pipeline.dropout.residual import is_residual, open_residuals
from pipeline.dropout.schedules import Limits, done_at, limits_at
from pipeline.dropout.shards import Shards, shards_by_site
from pipeline.dropout.sites import AUGMENTATION, JITTER, MODALITY
from pipeline.dropout.spectrogram import (
    SPECTROGRAM,
    SpanMask,
    SpanRequest,
    modelling_files,
    open_features,
    spans_by,
)
from pipeline.errors import DropoutError, LeakError

__all__ = ["ActiveMasks", "KeyedDropout", "Observer"]

_MASKS: dict[str, type[SiteMask]] = {NOISE: NoiseMask, JITTER: JitterMask}
Observer = Callable[[SiteMask | SpanMask, ActiveMasks, Tensor, Tensor], None]
"""Told of every draw before it happens: site, coordinates in force, key, tensor."""


class KeyedDropout:
    """Opens a model's doors and draws every planned mask by key.

    Args:
        model: any (peft-wrapped) module; changed in place, `release()` undoes it.
        plan: which sites are live, and their rates; its rate decides, never the call's.
        seed: the run's seed, 0 .. 2**64 - 1.

    Raises:
        DropoutError: a planned site is not in this model, or the model is bound already.
    """

    def __init__(self, model: nn.Module, plan: DropoutPlan, seed: int) -> None:
        self.model, self.plan, self.seed = model, plan, seed
        self.observer: Observer | None = None
        self._local = threading.local()
        self._names = doors.site_names(model)
        _check(plan, self._names)
        self._live = self._site_masks()
        self._known = {(site.door, site.site, site.call) for site in plan.sites}
        self._checkpointed = [m for m in self._names if hasattr(m, "gradient_checkpointing")]
        inserted = {site.site for site in plan.sites if site.door == doors.INSERTED}
        noisy = {site.site for site in plan.in_force(NOISE)}
        planned = {site.door for site in plan.sites}
        self._has_layer_drop = LAYER in planned
        self._drawn_by_models = plan.in_force(LAYER) + plan.in_force(SPECTROGRAM)
        self._span_files = modelling_files(self._names) if SPECTROGRAM in planned else []
        self._undo = [
            doors.open_modules(self._names, self._draw),
            open_attention(self._names, self._attends),
            doors.open_inserted(self._names, noisy, self._draw_noise),
            doors.open_inserted(self._names, inserted, self._draw),
            open_layers(self._names, {s.site for s in plan.in_force(LAYER)}, self._leaves_out),
            open_features(self._names if self._span_files else {}),
            open_jitter(self._names, self._draw, {s.site for s in plan.sites if s.door == JITTER}),
            open_residuals(self._names, self._draw),
            open_modality(self._names, self._draw, {s.site for s in plan.in_force(MODALITY)}),
            self._watch_calls({site.site for site in plan.sites}),
            lambda: doors.unwrap_checkpointing(self._checkpointed),
        ]

    def release(self) -> None:
        """Close every door; the model is as it was."""
        for undo in reversed(self._undo):
            undo()
        self._undo = []

    @contextmanager
    def context(
        self,
        *,
        purpose: str,
        index: int | Sequence[int],
        row_ids: Tensor,
        domains: Tensor | None = None,
        shard: Shards | None = None,
    ) -> Iterator[ActiveMasks]:
        """Draw masks for these rows until the block ends; covers forward and backward.

        Args:
            purpose: `train` or `mc`: separate streams.
            index: optimizer step or Monte-Carlo pass; one number, or one a row (passes stacked on
                the batch axis).
            row_ids: int64 `[B]`, stable sample ids (`[B, T]` for packed rows).
            domains: int64 `[B]`, each row's place in the plan's domains, -1 for none of them.
            shard: where this process's slice begins, for all sites or by role, if tensors are cut.
        """
        doors.wrap_checkpointing(self._checkpointed, self._segment)
        limits = self._limits(purpose, index, domains)
        shards = shards_by_site(shard, self.plan.in_force())
        active = ActiveMasks(self._keys(purpose, index), row_ids, index, purpose, limits, shards)
        with self._pushed(active):
            yield active

    def missing(self, active: ActiveMasks) -> list[str]:
        """Planned sites that have not drawn in a context, as `site#call`."""
        return [self._live[key].site.label for key in active.keys if key not in active.drawn]

    # -- opening ---------------------------------------------------------------------------------

    def _site_masks(self) -> dict[SiteCall, SiteMask]:
        stacks = [name for module, name in self._names.items() if fixes_positions(module)]
        result = {}
        for site in self.plan.in_force():
            around = {n for n in stacks if not n or f"{site.site}.".startswith(f"{n}.")}
            nearest = tuple(sorted(around, key=len, reverse=True))
            kind = _MASKS.get(site.door, SiteMask)
            result[site.door, site.site, site.call] = kind(site, nearest)
        rates = learned_rates_of(self.model)
        for place, site in enumerate(rates.sites if rates else ()):
            result[site.door, site.site, site.call].learned = (cast(LearnedRates, rates), place)
        if rates is None and any(site.learned for site in self.plan.in_force()):
            raise DropoutError(
                "The plan has learned rates, but the model holds none: add_learned_rates "
                "comes first."
            )
        return result

    def _watch_calls(self, sites: set[str]) -> Callable[[], None]:
        """Hooks that count nesting and read positions, on ancestors of sites and on stacks."""
        handles = []
        for module, name in self._names.items():
            prefix = name + "." if name else ""
            if fixes_positions(module) or any(
                site.startswith(prefix) for site in sites if site != name
            ):
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
            for site in self._drawn_by_models[:1]:
                self._without_context(site.label, site.rate)
            return
        active.enter()
        if fixes_positions(module):
            inputs = StackInputs.of(module, args, kwargs)
            if inputs is not None:
                active.stacks[self._names[module]] = inputs

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        active = self._active()
        if active is not None:
            active.leave()

    # -- one context -----------------------------------------------------------------------------

    def _active(self) -> ActiveMasks | None:
        return getattr(self._local, "active", None)

    @contextmanager
    def _pushed(self, active: ActiveMasks) -> Iterator[None]:
        previous = self._active()
        self._local.active = active
        try:
            with ExitStack() as opened:
                opened.enter_context(doors.open_functional(self._find))
                if self._has_layer_drop:
                    opened.enter_context(stacks_keep_layers(self._names, self._stack_draws))
                if self._span_files:
                    opened.enter_context(spans_by(self._span_files, self._names, self._spans))
                yield
        finally:
            self._local.active = previous

    def _find(self, module: nn.Module) -> tuple[str, doors.Draw] | None:
        name = self._names.get(module)
        return None if name is None else (name, self._draw)

    def _keys(self, purpose: str, index: int | Sequence[int]) -> dict[SiteCall, Tensor]:
        """The key of every site that is live in this purpose: one for all rows, or one a row."""
        spans = [key for key in self._live if key[0] in AUGMENTATION]
        masks = [key for key in self._live if key[0] not in AUGMENTATION]
        masks = [k for k in masks if purpose == "train" or self._live[k].site.in_passes]
        found = self._keys_of(masks, purpose, index)
        if purpose == "train":  # augmentation: Monte-Carlo passes leave it out
            found |= self._keys_of(spans, "augment", index)
        return found

    def _keys_of(
        self, live: list[SiteCall], purpose: str, index: int | Sequence[int]
    ) -> dict[SiteCall, Tensor]:
        indices = [index] if isinstance(index, int) else list(index)
        unique = sorted(set(indices))
        sites = [(self._live[key].site.variant, key[1], key[2]) for key in live]
        by_index = [
            [signed(key) for key in derive_keys(self.seed, purpose, i, sites)] for i in unique
        ]
        table = torch.tensor(by_index, dtype=torch.int64).T.reshape(len(sites), len(unique))
        place = torch.tensor([unique.index(i) for i in indices])
        return dict(zip(live, table[:, place], strict=True))

    def _limits(
        self, purpose: str, index: int | Sequence[int], domains: Tensor | None
    ) -> dict[SiteCall, Limits]:
        """Of the sites whose rate changes; only training makes progress."""
        indices, plan = [index] if isinstance(index, int) else list(index), self.plan
        limits = {}
        for call, mask in self._live.items():
            if mask.site.learned:
                rates, place = mask.learned or (None, 0)
                assert rates is not None
                site = replace(mask.site, rate=rates.rates()[place], learned=False)
                limits[call] = limits_at(site, [1.0], (), None)
            elif mask.site.changes:
                moves = purpose == "train" and mask.site.progress != "constant"
                done = [done_at(i, plan.num_steps, mask.site.site) for i in indices * moves]
                limits[call] = limits_at(mask.site, done or [1.0], plan.domains, domains)
        return limits

    def _segment(self, body: doors.Body) -> doors.Body:
        """A checkpointed segment: first run as always, its recompute from the captured state."""
        active = self._active()
        if active is None:
            return body
        state = active.snapshot()
        has_run = False

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal has_run
            if not has_run:
                has_run = True
                return body(*args, **kwargs)
            # Backward may run in another thread, where no context is in force: bring it along.
            with self._pushed(state.snapshot()):
                return body(*args, **kwargs)

        return run

    # -- one draw --------------------------------------------------------------------------------

    def _draw(self, door: str, site: str, x: Tensor, rate: float) -> Tensor:
        found = self._claim(door, site, rate)
        if found is None:
            return x
        mask, active, key = found
        if mask.call in active.idle:
            return x
        if self.observer is not None:
            self.observer(mask, active, key, x)
        return mask.apply(active, key, x)

    def _attends(self, site: str, rate: float) -> doors.SiteRate | float:
        """Attention by transformers' interface: the rate that its dropout brings to `_draw`."""
        if self._active() is None:
            self._without_context(site, rate)
            return 0.0
        return doors.SiteRate(site, self._draw, rate, self._coordinates)

    def _coordinates(self, site: str, rate: float, query: Tensor, num_keys: int) -> Any:
        """Those of a fused attention, which then has drawn; None where it must not be fused."""
        active = self._active()
        assert active is not None
        call = (doors.FUNCTIONAL, site, active.counters.get((doors.FUNCTIONAL, site), 0))
        mask, has_rows = self._live.get(call), query.shape[0] == len(active.row_ids)
        is_attention = mask is not None and mask.variant.name == "attention" and not mask.is_shared
        if self.observer is not None or not is_attention or not has_rows:
            return None
        found = self._claim(doors.FUNCTIONAL, site, rate)
        assert found is not None
        return found[0].coordinates(active, found[2], query.shape[2], num_keys, query.device)

    def _draw_noise(self, door: str, site: str, x: Tensor, rate: float) -> Tensor:
        """NEFTune: the hook of an inserted site, under its own door; only training draws."""
        is_training = self._active() is not None or self.model.training
        return self._draw(NOISE, site, x, 1.0 if is_training else 0.0)

    def _leaves_out(self, layer: str) -> Tensor | None:
        """LayerDrop: which rows leave this layer out, None where none does."""
        active = self._active()
        ones = torch.ones(1 if active is None else len(active.row_ids))
        kept = self._draw(LAYER, layer, ones, self._live[LAYER, layer, 0].site.rate) > 0
        if bool(kept.all()):
            return None
        if active is not None and not bool(kept.any()):  # what is inside has no need to draw
            inside = {call for call in self._live if f"{call[1]}.".startswith(f"{layer}.")}
            active.drawn |= inside
            active.idle |= inside - {(LAYER, layer, 0)}
        return ~kept

    def _stack_draws(self, layer: str, rate: float) -> None:
        self._not_in_force((LAYER, layer, 0), rate)

    def _spans(self, site: str, asked: SpanRequest) -> NDArray[np.bool_]:
        """SpecAugment: where the features of each row are masked."""
        ones = torch.ones(asked.shape)
        found = self._claim(SPECTROGRAM, site, asked.rate)
        if found is None:
            return np.zeros(asked.shape, dtype=bool)
        mask, active, key = found
        stack = active.stacks.get(site)
        if asked.over_time and asked.attention_mask is None and stack is not None:
            asked = replace(asked, attention_mask=stack.attention_mask)  # HuBERT hears padding
        spans = SpanMask(mask.site, asked, mask.variant, mask.rates(active).tolist())
        if self.observer is not None:
            self.observer(spans, active, key, ones)
        return (spans.apply(active, key, ones) == 0).numpy()

    def _claim(
        self, door: str, site: str, rate: float
    ) -> tuple[SiteMask, ActiveMasks, Tensor] | None:
        """The mask that this call draws, with its coordinates; None where it draws none."""
        active = self._active()
        if active is None:
            self._without_context(site, rate)
            return None
        key = (door, site, active.next_call(door, site))
        if key not in active.keys:
            self._not_in_force(key, rate)
            return None
        if doors.in_backward() and not active.recomputing:
            raise LeakError(
                f"Site {site}#{key[2]} draws inside backward, in a recompute that was not "
                "captured. Use the model's own checkpointing (train.gradient_checkpointing)."
            )
        active.drawn.add(key)
        return self._live[key], active, active.keys[key]

    def _without_context(self, site: str, rate: float) -> None:
        if rate > 0 and self.model.training:
            raise LeakError(
                f"Site {site} was asked to drop outside a mask context. Wrap forward and backward "
                "in `keyed.context(...)`, or call model.eval()."
            )

    def _not_in_force(self, key: SiteCall, rate: float) -> None:
        if key not in self._known and rate > 0 and self.model.training:
            raise LeakError(
                f"Site {key[1]}#{key[2]} dropped with rate {rate} but is not in the dropout plan; "
                "`masklock plan` lists what is."
            )


def _check(plan: DropoutPlan, names: dict[nn.Module, str]) -> None:
    if doors.is_bound(names):
        raise DropoutError(
            "This model's dropout is bound already, and would go on drawing for its first owner. "
            "Call release() on that KeyedDropout first."
        )
    absent = sorted({s.site for s in plan.sites if s.in_force} - set(names.values()))
    if absent:
        raise DropoutError(
            f"The dropout plan has {len(absent)} site(s) that this model lacks: "
            f"{', '.join(absent[:5])}. The plan was made for another model: delete the run folder, "
            "or use the configuration it came from."
        )
    dropouts = {
        n
        for m, n in names.items()
        if isinstance(m, nn.Dropout) or doors.is_path(m) or is_residual(m)
    }
    planned = plan.in_force(doors.MODULE) + plan.in_force(doors.PATH)
    wrong = [s.site for s in planned if s.site not in dropouts]
    if wrong:
        raise DropoutError(
            "Planned dropout modules are missing from the model (it was built with rate 0): "
            f"{', '.join(wrong[:5])}."
        )
