"""Whether two texts entail each other, by a user's classifier of natural language inference.

Answers are compared as they are, without their prompt: a classifier's input is short.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from pipeline.config.schema import RunConfig
from pipeline.errors import ModelError
from pipeline.hub import load_pretrained


class Entailment:
    """A classifier of pairs of texts.

    Args:
        config: with `evaluation.generation.entailment_model`.
        device: where it runs.

    Raises:
        ModelError: it cannot be loaded, or has no label `entailment`.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        settings = config.evaluation.generation
        assert settings is not None
        assert settings.entailment_model is not None
        name, model = settings.entailment_model, config.model
        # Neither the revision nor the trust given to the run's model are meant for this one.
        safe = model.model_copy(update={"model_revision": "main", "trust_remote_code": False})
        plain = config.model_copy(update={"model": safe})
        self._tokenizer = load_pretrained("tokenizer", AutoTokenizer, name, plain)
        auto = AutoModelForSequenceClassification
        self._model: Any = load_pretrained("entailment model", auto, name, plain).eval().to(device)
        self._label = _label_of(name, self._model.config.id2label)

    def same(self, texts: Sequence[str]) -> Callable[[int, int], bool]:
        """Texts that entail each other, both ways; equal texts do."""

        @cache
        def entails(premise: str, hypothesis: str) -> bool:
            given = self._tokenizer(premise, hypothesis, return_tensors="pt", truncation=True)
            with torch.inference_mode():
                logits = self._model(**given.to(self._model.device)).logits
            return int(logits.argmax()) == self._label

        def both(one: int, other: int) -> bool:
            first, second = texts[one], texts[other]
            return first == second or (entails(first, second) and entails(second, first))

        return both


def _label_of(name: str, labels: dict[int, str]) -> int:
    found = [number for number, label in labels.items() if label.casefold() == "entailment"]
    if not found:
        raise ModelError(
            f"evaluation.generation.entailment_model: {name} tells {', '.join(labels.values())}, "
            "none of which is `entailment`. Name a classifier of natural language inference."
        )
    return found[0]
