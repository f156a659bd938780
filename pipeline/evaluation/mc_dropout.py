"""Monte-Carlo dropout with planned sites only: pass t of sample i draws the same masks anywhere.

Gal & Ghahramani, "Dropout as a Bayesian Approximation", ICML 2016. The model stays in eval mode:
`model.train()` would also switch on LayerDrop, SpecAugment and batch statistics. Where only the
head is live, the body runs once.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from pipeline.dropout.audit import audited
from pipeline.dropout.context import KeyedDropout
from pipeline.errors import DropoutError, LeakError
from pipeline.evaluation.forward import (
    fixed_output,
    kept_outputs,
    logits_of,
    named_body,
    num_bytes,
    repeated,
)

logger = logging.getLogger(__name__)

_STACK_BYTES = 64 * 2**20  # what passes that run at once may copy of the body's output


class MonteCarlo:
    """The Monte-Carlo passes of one model.

    Args:
        keyed: keyed dropout bound to the model; the plan's rates decide.
        num_passes: T; without a live site all passes would be equal, and one is run.
        strict: randomness outside the plan in the first batch is an error, else a warning.
    """

    def __init__(self, keyed: KeyedDropout, num_passes: int, *, strict: bool = True) -> None:
        self.keyed, self.strict = keyed, strict
        self.num_passes = num_passes if keyed.plan.in_passes() else 1
        self.body = head_only_body(keyed)
        self._is_audited = False

    def passes(
        self,
        inputs: dict[str, Tensor],
        sample_ids: Tensor,
        body_output: Any = None,
        domains: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Logits of the T passes over one batch, one after the other.

        Args:
            inputs: what the model takes, N rows.
            sample_ids: int64 [N]; with the pass they decide the masks.
            body_output: what `self.body` answered to the same inputs, to save running it.
            domains: int64 [N], the rows' data domains, where these have rates of their own.
        """
        if not self._is_audited:
            self._audit(inputs, sample_ids, domains)
        if self.body is None:
            for index in range(self.num_passes):
                yield self._run(inputs, sample_ids, index, domains)
        else:
            if body_output is None:
                body_output = _output_of(self.body, self.keyed.model, inputs)
            yield from self._head_passes(self.body, body_output, inputs, sample_ids, domains)

    def _run(
        self,
        inputs: dict[str, Tensor],
        row_ids: Tensor,
        index: int | Sequence[int],
        domains: Tensor | None,
    ) -> Tensor:
        context = self.keyed.context(purpose="mc", index=index, row_ids=row_ids, domains=domains)
        with context as active:
            logits = logits_of(self.keyed.model, inputs)
        missing = self.keyed.missing(active)
        if missing:
            raise DropoutError(
                f"{len(missing)} planned site(s) drew nothing in evaluation mode: "
                f"{', '.join(missing[:5])}. The model skips them there; set their rates to 0."
            )
        return logits

    def _head_passes(
        self,
        body: nn.Module,
        output: Any,
        inputs: dict[str, Tensor],
        sample_ids: Tensor,
        domains: Tensor | None,
    ) -> Iterator[Tensor]:
        """The first pass alone, which shows how large its logits are; the others stacked."""
        num_rows, start, at_once = len(sample_ids), 0, 1
        while start < self.num_passes:
            passes = range(start, min(start + at_once, self.num_passes))
            stacked = {name: repeated([t], len(passes))[0] for name, t in inputs.items()}
            with fixed_output(body, repeated(output, len(passes))):
                logits = self._run(
                    stacked,
                    sample_ids.repeat(len(passes)),
                    [index for index in passes for _ in range(num_rows)],
                    None if domains is None else domains.repeat(len(passes)),
                )
            one_pass = max(1, num_bytes(output), logits.nbytes // len(passes))
            start, at_once = passes.stop, max(1, _STACK_BYTES // one_pass)
            yield from logits.split(num_rows)

    def _audit(self, inputs: dict[str, Tensor], sample_ids: Tensor, domains: Tensor | None) -> None:
        """One pass under watch: what draws past the doors makes results that nobody can replay."""
        self._is_audited = True
        with audited(self.keyed.model) as leaks:
            self._run(inputs, sample_ids, 0, domains)
        if not leaks:
            return
        message = (
            "Monte-Carlo passes drew randomness outside the dropout plan: "
            f"{', '.join(str(leak) for leak in leaks)}."
        )
        if self.strict:
            raise LeakError(
                f"{message} Set its rate to 0, or dropout.strict=false to go on without replay."
            )
        logger.warning("%s These results cannot be replayed.", message)


def head_only_body(keyed: KeyedDropout) -> nn.Module | None:
    """The body of a model whose live sites are all in the head; it needs to run only once."""
    found = named_body(keyed.model)
    if found is None:
        return None
    name, body = found
    is_live = any(f"{site.site}.".startswith(f"{name}.") for site in keyed.plan.in_passes())
    return None if is_live else body


def _output_of(body: nn.Module, model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    with kept_outputs(body) as kept:
        logits_of(model, inputs)
    return kept[0]
