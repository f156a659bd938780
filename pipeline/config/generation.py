"""The section of generated sequences in an evaluation."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.roles import NonNegativeInt, PositiveInt, Section

Share = Annotated[float, Field(gt=0.0, le=1.0)]


class SequenceConfig(Section):
    """Let the model go on from test rows: how sure it is of what it says, under keyed dropout."""

    num_prompts: PositiveInt = 100
    """Test rows, chosen by key."""
    prompt_tokens: PositiveInt = 32
    """Tokens of a plain text that are given; of a conversation, all before the assistant's last turn."""
    max_new_tokens: PositiveInt = 64
    """Longest continuation."""
    num_beams: PositiveInt = 1
    """Beams of the likeliest continuation; 1 is greedy."""
    num_samples: NonNegativeInt = 5
    """Continuations sampled by key, each under a dropout network of its own; 0 for none."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Of the sampled ones."""
    same_meaning: Literal["match", "embedding", "entailment"] = "match"
    """When sampled continuations count as one answer: equal words (case and punctuation aside), pooled hidden states of a cosine of at least `similarity`, or entailment both ways by `entailment_model`."""
    similarity: Share = 0.95
    """Least cosine, for `embedding`."""
    entailment_model: str | None = None
    """Hub name or folder of a sequence classifier with a label `entailment`, for `entailment`."""
    utility: Literal["chrf", "token_f1"] = "chrf"
    """How alike two texts are: for the minimum-Bayes-risk choice, and beside the true continuation."""
    use_cache: bool = True
    """Keep keys and values of earlier tokens; false for models whose cache changes what they say."""

    @model_validator(mode="after")
    def _pairs(self) -> "SequenceConfig":
        if (self.same_meaning == "entailment") != (self.entailment_model is not None):
            raise ValueError("same_meaning: entailment and entailment_model go together")
        if self.num_samples == 1:
            raise ValueError("one sampled continuation says nothing: num_samples is 0, 2 or more")
        return self
