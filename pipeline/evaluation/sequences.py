"""What the model says to test prompts, and how sure it is: one row a prompt.

The likeliest continuation, of the network without dropout, is scored again under every pass;
others are sampled by key, each under a network of its own.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline import parallel
from pipeline.config.generation import SequenceConfig
from pipeline.config.schema import RunConfig
from pipeline.errors import DataError
from pipeline.evaluation.bayes_risk import UTILITIES, least_risk
from pipeline.evaluation.entailment import Entailment
from pipeline.evaluation.generation import Decoding, Generated, Generator, Rows
from pipeline.evaluation.semantic import (
    Same,
    clusters,
    same_direction,
    same_words,
    semantic_entropy,
    weighted_semantic_entropy,
)
from pipeline.evaluation.token_uncertainty import TokenSums
from pipeline.modality.bundle import Modality, Prompt, kept_numbers, modality_of

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]
_PROMPT_CHARACTERS = 300  # the end of a prompt, for people to read


class SequenceJudge:
    """Generates from prepared rows and judges what was said.

    Args:
        generator: of the run's model.
        config: with `evaluation.generation`.
        processor: the run's.
    """

    def __init__(self, generator: Generator, config: RunConfig, processor: Any) -> None:
        settings, modality = config.evaluation.generation, modality_of(config)
        assert settings is not None
        assert modality.prompt is not None
        assert modality.prompt_collator is not None
        self.generator, self.settings, self.config = generator, settings, config
        self.modality: Modality = modality
        self._prompt, self._collate = modality.prompt, modality.prompt_collator(processor, config)
        self._device = next(generator.model.parameters()).device
        keyed = generator.keyed
        is_live = keyed is not None and bool(keyed.plan.in_passes())
        self._passes = list(range(config.evaluation.num_mc_passes)) if is_live else [None]
        self._entailment: Entailment | None = None
        if settings.same_meaning == "entailment" and settings.num_samples:
            self._entailment = Entailment(config, self._device)

    def rows(self, test: "Dataset") -> list[Row]:
        """One row a prompt, in the order of the samples, on the main process; else nothing.

        Raises:
            DataError: no row is long enough to be gone on from.
        """
        prompts = self._prompts(test)
        size = self.config.evaluation.batch_size
        by_length = sorted(prompts, key=_length_and_id)
        batches = [by_length[start : start + size] for start in range(0, len(by_length), size)]
        # Whole batches, not rows, are shared out: each has the shape that one process would run.
        mine = batches[parallel.rank() :: parallel.world_size()]
        found = parallel.to_main([row for batch in mine for row in self._batch(batch)])
        return sorted((row for part in found for row in part), key=lambda row: row["sample_id"])

    def _prompts(self, test: "Dataset") -> list[Prompt]:
        settings = self.settings
        found = [self._prompt(row, settings.prompt_tokens) for row in test]
        usable = [prompt for prompt in found if prompt is not None]
        if not usable:
            raise DataError(
                f"evaluation.generation asks for prompts of {settings.prompt_tokens} tokens, but "
                "nothing follows them in any test row; ask for shorter ones."
            )
        return [usable[n] for n in kept_numbers(len(usable), settings.num_prompts)]

    def _batch(self, prompts: Sequence[Prompt]) -> Iterator[Row]:
        inputs = self._collate([prompt.row for prompt in prompts])
        inputs = {name: value.to(self._device) for name, value in inputs.items()}
        ids = torch.tensor([prompt.row["sample_id"] for prompt in prompts], device=self._device)
        codes = [prompt.row["domain"] for prompt in prompts if "domain" in prompt.row]
        rows = Rows(ids, domains=torch.tensor(codes, device=self._device) if codes else None)
        said = self.generator.generate(inputs, rows, self._likeliest())
        figures = self._figures(inputs, rows, said)
        samples, embeddings = self._samples(inputs, rows)
        for place, (prompt, one) in enumerate(zip(prompts, said, strict=True)):
            drawn = [sample[place] for sample in samples]
            states = None if embeddings is None else embeddings[:, place].numpy()
            same = self._same([sample.text for sample in drawn], states)
            yield self._row(prompt, one) | figures[place] | self._meanings(prompt, drawn, same)

    def _likeliest(self) -> Decoding:
        settings = self.settings
        return Decoding(settings.max_new_tokens, settings.num_beams, use_cache=settings.use_cache)

    def _figures(
        self, inputs: dict[str, Tensor], rows: Rows, said: Sequence[Generated]
    ) -> list[Row]:
        """Of the likeliest continuations, scored in a full pass of every network."""
        whole = self.generator.whole(inputs, [list(one.tokens) for one in said])
        sums, totals = TokenSums(whole.targets), []
        for index in self._passes:
            with self.generator.context(Rows(rows.sample_ids, index, rows.domains)):
                logits = whole.logits(self.generator.model)
            sums.update(logits)
            totals.append(whole.log_probabilities_of(logits).sum(1))
        mean = sums.result().per_sample(len(said))
        joint = torch.stack(totals).logsumexp(0) - torch.tensor(float(len(totals))).log()
        columns = {
            "generated_log_probability": mean.log_probability,
            "generated_sequence_log_probability": mean.log_probability * mean.num_tokens,
            "generated_joint_log_probability": joint,
            "generated_predictive_entropy": mean.predictive_entropy,
            "generated_mutual_information": mean.mutual_information,
        }
        lists = {name: values.tolist() for name, values in columns.items()}
        return [{name: lists[name][n] for name in lists} for n in range(len(said))]

    def _samples(
        self, inputs: dict[str, Tensor], rows: Rows
    ) -> tuple[list[list[Generated]], Tensor | None]:
        """Sampled continuations, and with `same_meaning: embedding` their states [S, B, D]."""
        settings, found, states = self.settings, [], []
        decoding = Decoding(
            settings.max_new_tokens, temperature=settings.temperature, use_cache=settings.use_cache
        )
        is_live = self._passes[0] is not None
        for draw in range(settings.num_samples):
            network = Rows(rows.sample_ids, draw if is_live else None, rows.domains)
            found.append(self.generator.generate(inputs, network, decoding, draw))
            if settings.same_meaning == "embedding":
                whole = self.generator.whole(inputs, [list(one.tokens) for one in found[-1]])
                states.append(whole.embeddings(self.generator.model))
        return found, torch.stack(states) if states else None

    def _same(self, texts: list[str], states: Any) -> Same:
        if self._entailment is not None:
            return self._entailment.same(texts)
        if states is not None:
            return same_direction(states, self.settings.similarity)
        return same_words(texts)

    def _reference(self, prompt: Prompt) -> str:
        """What really followed, as far as the model was to go on."""
        tokens = prompt.reference[: self.settings.max_new_tokens]
        text: str = self.generator.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _given(self, prompt: Prompt) -> str:
        tokens = prompt.row.get("input_ids")
        if tokens is None:  # a clip, say
            return str(prompt.row.get("text") or "")
        text: str = self.generator.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _row(self, prompt: Prompt, said: Generated) -> Row:
        reference, alike = self._reference(prompt), UTILITIES[self.settings.utility]
        return {
            "sample_id": said.sample_id,
            "prompt_text": self._given(prompt)[-_PROMPT_CHARACTERS:],
            "generated_text": said.text,
            "reference_text": reference,
            "generated_num_tokens": len(said.tokens),
            f"generated_{self.settings.utility}": alike(said.text, reference),
        }

    def _meanings(self, prompt: Prompt, drawn: Sequence[Generated], same: Same) -> Row:
        """Of the sampled continuations; nothing without them."""
        if not drawn:
            return {}
        name, texts = self.settings.utility, [one.text for one in drawn]
        found, alike = clusters(len(texts), same), UTILITIES[name]
        chosen = texts[least_risk(texts, alike)]
        return {
            "semantic_entropy": semantic_entropy(found),
            "weighted_semantic_entropy": weighted_semantic_entropy(
                found, [one.mean_log_probability for one in drawn]
            ),
            "num_meanings": len(set(found)),
            "least_risk_text": chosen,
            f"least_risk_{name}": alike(chosen, self._reference(prompt)),
        }


def _length_and_id(prompt: Prompt) -> tuple[int, int]:
    return len(prompt.row.get("input_ids", ())), prompt.row["sample_id"]


def sequence_section(rows: Sequence[Row], settings: SequenceConfig) -> dict[str, Any]:
    """Means over the prompts, and how well each measure tells better continuations from worse.

    `rank_correlation` is Spearman's, between a measure of uncertainty and the likeness to the true
    continuation: -1 where the less certain is always the worse; None where one of them is constant.
    """
    from scipy.stats import spearmanr

    numbers = {n: [row[n] for row in rows] for n, value in rows[0].items() if _is_number(n, value)}
    quality = numbers[f"generated_{settings.utility}"]
    correlations = {}
    for name in UNCERTAINTIES:
        if name in numbers:
            sign = -1 if name.endswith("log_probability") else 1
            constant = len(set(numbers[name])) < 2 or len(set(quality)) < 2
            values = [sign * value for value in numbers[name]]
            correlations[name] = None if constant else float(spearmanr(values, quality).statistic)
    return {
        "settings": settings.model_dump(),
        "num_prompts": len(rows),
        "means": {name: sum(values) / len(values) for name, values in numbers.items()},
        "rank_correlation": correlations,
    }


UNCERTAINTIES = (
    *("generated_log_probability", "generated_sequence_log_probability"),
    *("generated_joint_log_probability", "generated_predictive_entropy"),
    *("generated_mutual_information", "semantic_entropy", "weighted_semantic_entropy"),
)


def _is_number(name: str, value: Any) -> bool:
    return isinstance(value, int | float) and name != "sample_id"
