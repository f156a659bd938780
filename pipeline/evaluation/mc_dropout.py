"""Monte-Carlo dropout with planned sites only: pass t of sample i draws the same masks in any batch, any order.

Gal & Ghahramani, "Dropout as a Bayesian Approximation", ICML 2016. The model stays in eval mode: `model.train()` would
also switch on LayerDrop, SpecAugment and batch statistics. Where only the head is live, the body runs once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.dropout.audit import audited
from pipeline.dropout.context import KeyedDropout
from pipeline.errors import DropoutError, LeakError

_STACK_BYTES = 64 * 2**20  # copies of the body's output for passes run at once


class MonteCarlo:
    """The Monte-Carlo passes of one model.

    Args:
        keyed: keyed dropout bound to the model; the plan's rates decide.
        num_passes: T.
        strict: randomness outside the plan in the first batch is an error.

    Raises:
        DropoutError: the plan has no live site, so that all passes would be equal.
    """

    def __init__(self, keyed: KeyedDropout, num_passes: int, *, strict: bool = True) -> None:
        if not keyed.plan.in_force():
            raise DropoutError(
                "Monte-Carlo dropout needs a live site, but every rate of this run's dropout plan is 0: all passes "
                "would be equal. Set a rate under `dropout:` (for models without dropout, `dropout.insert`)."
            )
        self.keyed, self.num_passes = keyed, num_passes
        self.body = head_only_body(keyed)
        self._must_audit = strict

    def passes(self, inputs: dict[str, Tensor], sample_ids: Tensor) -> Iterator[Tensor]:
        """Logits of the T passes over one batch: `[N, ...]` each, or `[t, N, C]` for t passes run at once."""
        if self._must_audit:
            self._audit(inputs, sample_ids)
        if self.body is None:
            for index in range(self.num_passes):
                yield self._run(inputs, sample_ids, index)
        else:
            yield from self._head_passes(self.body, inputs, sample_ids)

    def _run(self, inputs: dict[str, Tensor], row_ids: Tensor, index: Any) -> Tensor:
        with (
            torch.inference_mode(),
            self.keyed.context(purpose="mc", index=index, row_ids=row_ids) as active,
        ):
            logits = self.keyed.model(**inputs).logits
        missing = self.keyed.missing(active)
        if missing:
            raise DropoutError(
                f"{len(missing)} planned site(s) drew nothing in evaluation mode: {', '.join(missing[:5])}. "
                "The model skips them there; set their rates to 0."
            )
        return logits

    def _head_passes(
        self, body: nn.Module, inputs: dict[str, Tensor], sample_ids: Tensor
    ) -> Iterator[Tensor]:
        output = _body_output(self.keyed.model, body, inputs)
        num_rows = len(sample_ids)
        size = sum(t.nbytes for t in _tensors(output))
        at_once = max(1, _STACK_BYTES // max(1, size))
        for start in range(0, self.num_passes, at_once):
            passes = range(start, min(start + at_once, self.num_passes))
            repeated = {k: v.repeat(len(passes), *[1] * (v.dim() - 1)) for k, v in inputs.items()}
            index = [t for t in passes for _ in range(num_rows)]
            with _fixed(body, _repeated(output, len(passes))):
                logits = self._run(repeated, sample_ids.repeat(len(passes)), index)
            yield logits.view(len(passes), num_rows, *logits.shape[1:])

    def _audit(self, inputs: dict[str, Tensor], sample_ids: Tensor) -> None:
        """One pass under watch: whatever draws past the doors would make results that cannot be replayed."""
        self._must_audit = False
        with audited(self.keyed.model) as leaks:
            self._run(inputs, sample_ids, 0)
        if leaks:
            listed = ", ".join(str(leak) for leak in leaks)
            raise LeakError(
                f"Monte-Carlo passes drew randomness outside the dropout plan: {listed}."
            )


def head_only_body(keyed: KeyedDropout) -> nn.Module | None:
    """The body of a model whose live sites are all in the head: it needs to run only once. None otherwise."""
    model = keyed.model
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    prefix = getattr(bare, "base_model_prefix", "")
    body = getattr(bare, prefix, None) if prefix else None
    if not isinstance(body, nn.Module) or body is bare:
        return None
    in_body = [
        s for s in keyed.plan.in_force() if s.site == prefix or s.site.startswith(prefix + ".")
    ]
    return None if in_body else body


def _body_output(model: nn.Module, body: nn.Module, inputs: dict[str, Tensor]) -> Any:
    kept: list[Any] = []
    handle = body.register_forward_hook(lambda module, args, output: kept.append(output))
    try:
        with torch.inference_mode():
            model(**inputs)
    finally:
        handle.remove()
    return kept[0]


@contextmanager
def _fixed(body: nn.Module, output: Any) -> Iterator[None]:
    """The body answers with a given output in place of running."""
    body.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del body.forward


def _tensors(output: Any) -> list[Tensor]:
    values = output.values() if isinstance(output, dict) else output
    return [value for value in values if isinstance(value, Tensor)]


def _repeated(output: Any, times: int) -> Any:
    def repeat(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.repeat(times, *[1] * (value.dim() - 1))
        return None

    if is_dataclass(output):
        return type(output)(**{f.name: repeat(getattr(output, f.name)) for f in fields(output)})
    return tuple(repeat(value) for value in output)
