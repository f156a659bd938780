"""Sequences generated under one dropout network: masks by absolute position, whatever is cached.

In pass t every token of a sequence, prompt and continuation, meets the masks of pass t, so that
decoding with a key-value cache gives the logits of one full pass over the finished sequence. Beams
of a sample share its masks; batches, padding and order change nothing but the last bits of sums.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList

from pipeline.dropout.context import KeyedDropout
from pipeline.errors import DataError, DropoutError, ModelError
from pipeline.evaluation.decoding import KeyedGumbel
from pipeline.evaluation.forward import bare_model
from pipeline.evaluation.rescoring import Whole, whole_of

_NUM_CHECKED = 4  # tokens of the first batch that are decoded both ways
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of the spread of the logits
_LOW_PRECISION_TOLERANCE = 0.1
_NO_TOKEN = 2**31 - 1  # None would be taken for the model's own end token


@dataclass(frozen=True)
class Decoding:
    """How sequences are chosen."""

    max_new_tokens: int = 64
    num_beams: int = 1
    temperature: float | None = None
    """None: the likeliest (greedy, or by beams); otherwise sampled by key at this temperature."""
    use_cache: bool = True
    """False runs every step over the whole sequence: for models that cannot be cached alike."""
    ends: bool = True
    """False goes on behind the end token too, for `max_new_tokens` always."""

    def __post_init__(self) -> None:
        if self.temperature is not None and (self.num_beams > 1 or self.temperature <= 0):
            raise ValueError(
                f"Sampling takes one beam and a temperature above 0, not {self.num_beams} and "
                f"{self.temperature}."
            )


@dataclass(frozen=True)
class Generated:
    """One sample's continuation, with the network's own log-probabilities (at temperature 1)."""

    sample_id: int
    tokens: tuple[int, ...]
    """Up to the end token, which is among them where it was reached."""
    text: str
    token_log_probabilities: tuple[float, ...]

    @property
    def log_probability(self) -> float:
        """Of the whole continuation, in nats."""
        return sum(self.token_log_probabilities)

    @property
    def mean_log_probability(self) -> float:
        """The same, length-normalised: nats a token (Malinin & Gales, ICLR 2021)."""
        return self.log_probability / max(1, len(self.tokens))


@dataclass(frozen=True)
class Rows:
    """Whose prompts a batch holds, and under which network they are continued."""

    sample_ids: Tensor
    """int64 `[B]`; with the pass they decide masks and sampled tokens."""
    index: int | None = None
    """Monte-Carlo pass; None: the network without dropout."""
    domains: Tensor | None = None
    """int64 `[B]`, where data domains have rates of their own."""


class Generator:
    """Generates with one model; the first batch proves that its cache changes nothing.

    Args:
        model: (peft-wrapped) causal or encoder-decoder model; put into eval mode.
        keyed: keyed dropout bound to it; None for a model without.
        tokenizer: decodes tokens to text.
        seed: the run's, behind sampled tokens.

    Raises:
        ModelError: the model cannot generate.
    """

    def __init__(
        self, model: nn.Module, keyed: KeyedDropout | None, tokenizer: Any, seed: int
    ) -> None:
        bare = bare_model(model)
        if not isinstance(bare, GenerationMixin):
            raise ModelError(
                f"{type(bare).__name__} was to generate text, but transformers generates none with "
                "it. Leave evaluation.generation out, or choose another model."
            )
        self.model, self.keyed, self.tokenizer, self.seed = model.eval(), keyed, tokenizer, seed
        self._is_checked = False

    def generate(
        self, inputs: dict[str, Tensor], rows: Rows, decoding: Decoding, draw: int = 0
    ) -> list[Generated]:
        """The rows' continuations, in their order.

        Args:
            inputs: prompts as the model takes them, B rows: `input_ids` padded on the left, or an
                encoder's inputs (`decoder_input_ids` may begin what the decoder says).
            rows: their samples, and the pass.
            decoding: how tokens are chosen.
            draw: number of the sampled sequence, where tokens are sampled.

        Raises:
            DataError: prompts are not padded on the left.
            DropoutError: decoding with a cache gives other logits than one full pass.
        """
        if not bare_model(self.model).config.is_encoder_decoder:
            _require_left_padding(inputs.get("attention_mask"))
        if rows.index is not None and not self._is_checked:
            self._check_cache(inputs, rows, decoding)
        processors = LogitsProcessorList()
        if decoding.temperature is not None:
            processors.append(
                KeyedGumbel(self.seed, draw, rows.sample_ids.tolist(), decoding.temperature)
            )
        sequences = self._decode(inputs, rows, decoding, processors).sequences
        whole = whole_of(bare_model(self.model), inputs, sequences, self._ends(decoding))
        with self.context(rows):
            log_p = whole.log_probabilities(self.model)
        return self._results(rows, whole, log_p)

    def whole(self, inputs: dict[str, Tensor], continuations: list[list[int]]) -> Whole:
        """Prompts and given continuations, to be scored in full passes."""
        return Whole.of(bare_model(self.model), inputs, continuations)

    def context(self, rows: Rows, copies: int = 1) -> AbstractContextManager[Any]:
        """The masks of the rows' pass, where each sample has so many neighbouring rows."""
        if self.keyed is None or rows.index is None:
            return nullcontext()
        return self.keyed.context(
            purpose="mc",
            index=rows.index,
            row_ids=rows.sample_ids.repeat_interleave(copies),
            domains=None if rows.domains is None else rows.domains.repeat_interleave(copies),
        )

    def _decode(
        self,
        inputs: dict[str, Tensor],
        rows: Rows,
        decoding: Decoding,
        processors: LogitsProcessorList,
        **options: Any,
    ) -> Any:
        bare = bare_model(self.model)
        settings = _settings(decoding, **_placeholders(bare), **options)
        # Whisper's own `generate` cuts clips into windows, but here a row is a sample. A learned
        # prompt is put before the rows by the adapter alone.
        run: Any = self.model.generate if _learns_prompt(self.model) else _generation_of(bare)
        with torch.inference_mode():
            given = inputs
            if bare.config.is_encoder_decoder:
                with self.context(rows):
                    given = _with_encoded(bare, inputs)
            with self.context(rows, decoding.num_beams):
                return run(**given, generation_config=settings, logits_processor=processors)

    def _results(self, rows: Rows, whole: Whole, log_p: Tensor) -> list[Generated]:
        found = []
        for row, sample_id in enumerate(rows.sample_ids.tolist()):
            tokens = whole.continuations[row]
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            said = tuple(log_p[row, : len(tokens)].tolist())
            found.append(Generated(sample_id, tuple(tokens), text, said))
        return found

    def _ends(self, decoding: Decoding) -> frozenset[int]:
        """The tokens that close a sequence."""
        if not decoding.ends:
            return frozenset()
        end = bare_model(self.model).generation_config.eos_token_id
        return frozenset(end if isinstance(end, list) else [end]) - {None}

    def _check_cache(self, inputs: dict[str, Tensor], rows: Rows, decoding: Decoding) -> None:
        """A few tokens of the first batch, decoded and in one full pass: the logits must agree."""
        self._is_checked = True
        size = min(_NUM_CHECKED, decoding.max_new_tokens)
        few = Decoding(size, use_cache=decoding.use_cache, ends=False)
        found = self._decode(inputs, rows, few, LogitsProcessorList(), output_logits=True)
        whole = whole_of(bare_model(self.model), inputs, found.sequences, frozenset())
        with self.context(rows) as active:
            expected = whole.logits(self.model)
        self._require_all_drew(active)
        steps = torch.stack(found.logits, dim=1).to(expected)
        off = float((steps - expected).square().mean().sqrt() / expected.std().clamp(min=1e-12))
        dtype = next(self.model.parameters()).dtype
        if not off <= _TOLERANCE.get(dtype, _LOW_PRECISION_TOLERANCE):
            raise DropoutError(
                f"{type(bare_model(self.model)).__name__} was to decode step by step what one full "
                f"pass says under the same masks, but their logits differ by {off:.1e} of their "
                "spread: its sequences would not be those of one dropout network. "
                + ("Set evaluation.generation.use_cache to false." if decoding.use_cache else
                   "Leave evaluation.generation out for this model.")
            )  # fmt: skip

    def _require_all_drew(self, active: Any) -> None:
        missing = [] if self.keyed is None else self.keyed.missing(active)
        if missing:
            raise DropoutError(
                f"{len(missing)} planned site(s) drew nothing in generation: "
                f"{', '.join(missing[:5])}. The model skips them there; set their rates to 0."
            )


def _settings(decoding: Decoding, **options: Any) -> GenerationConfig:
    """Everything that chooses tokens, said here: a model's own defaults fill only what is unset."""
    endless = {} if decoding.ends else {"eos_token_id": _NO_TOKEN, "pad_token_id": 0}
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        num_beams=decoding.num_beams,
        use_cache=decoding.use_cache,
        do_sample=False,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        num_return_sequences=1,
        length_penalty=1.0,
        return_dict_in_generate=True,
        **endless,
        **options,
    )


def _placeholders(bare: Any) -> dict[str, Any]:
    """Tokens that stand for an image or a sound in a prompt are nothing that a model can say."""
    names = (f"{signal}_token_id" for signal in ("image", "video", "audio"))
    tokens = [one for name in names if isinstance(one := getattr(bare.config, name, None), int)]
    own = bare.generation_config.suppress_tokens or []
    return {"suppress_tokens": sorted({*own, *tokens})} if tokens else {}


def _generation_of(bare: Any) -> Any:
    return lambda **given: GenerationMixin.generate(bare, **given)


def _learns_prompt(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def _with_encoded(bare: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """An encoder-decoder's inputs, its encoder run once, whatever the number of beams."""
    encoder = bare.get_encoder()
    names = signature(encoder.forward).parameters
    encoded = encoder(**{name: value for name, value in inputs.items() if name in names})
    kept = ("attention_mask", "decoder_input_ids")
    given = {name: inputs[name] for name in kept if name in inputs}
    return given | {"encoder_outputs": encoded}


def _require_left_padding(attention_mask: Tensor | None) -> None:
    if attention_mask is not None and not bool(attention_mask[:, -1].all()):
        raise DataError(
            "Prompts are continued at their end, so they are padded on the left, but these are "
            "padded on the right. Set the tokenizer's padding_side to left."
        )
