"""The `dropout` section: rates by role, inserted sites, learned rates, whole channels masked."""

from typing import Annotated

from pydantic import Field, model_validator

from pipeline.config.roles import NonNegativeFloat, Rate, RoleDropout, Section


class InsertConfig(Section):
    """Dropout sites for models that have none there (Llama, Qwen, Gemma, Mistral; images)."""

    embedding: RoleDropout | None = None
    """After the token embedding."""
    hidden: RoleDropout | None = None
    """On the output of every attention and MLP block, before the residual sum."""
    patch: RoleDropout | None = None
    """On the embedded patches of an image, before positions are added: whole patches, unless a variant is given."""
    head: RoleDropout | None = None
    """On the last norm of an image model, which its classifier reads."""

    @model_validator(mode="after")
    def _rates(self) -> "InsertConfig":
        if bare := [role for role, given in self if given is not None and given.rate is None]:
            raise ValueError(f"an inserted site has no rate of its own: give {bare[0]} a rate")
        return self


class ConcreteConfig(Section):
    """Concrete dropout, for roles with `learned: true`."""

    learning_rate: Annotated[float, Field(gt=0)] = 0.01
    """Of the logits of the rates; those of the weights are much too small for them."""
    temperature: Annotated[float, Field(gt=0)] = 0.1
    """Of the relaxed mask in training."""
    length_scale: NonNegativeFloat = 1e-4
    """Prior length scale l: weights cost l^2 / 2 |W|^2 / (1 - rate)."""


class DropoutConfig(Section):
    """Dropout by role: a rate, or a mapping such as `{rate: 0.1, variant: token, depth: linear}`.

    A role left out keeps the model's own rate; 0 switches it off.
    """

    embedding: RoleDropout | None = None
    attention: RoleDropout | None = None
    """On attention probabilities; needs `attn_implementation: keyed` or `eager`, chosen by itself."""
    hidden: RoleDropout | None = None
    """On the outputs of attention and feed-forward blocks."""
    activation: RoleDropout | None = None
    """Inside feed-forward blocks."""
    head: RoleDropout | None = None
    """Before the classifier."""
    adapter: RoleDropout | None = None
    """Inside adapters (`lora_dropout`)."""
    feature: RoleDropout | None = None
    """On the projected features of audio (`feat_proj_dropout`)."""
    layer: RoleDropout | None = None
    """Whole layers left out (LayerDrop), one decision a step for all samples; in training and in Monte-Carlo passes."""
    path: RoleDropout | None = None
    """The path beside a residual connection dropped (stochastic depth, `DropPath`), one decision a sample; models with a rule by layer give it to the last one whole."""
    spectrogram: RoleDropout | None = None
    """Spans of time and of features masked in audio (SpecAugment): in training only."""
    modality: dict[str, Rate] = {}
    """Rate by channel (multimodal-classification): how often the whole channel of a sample is masked; one channel of a sample at most."""
    modality_in_passes: bool = False
    """Mask channels in Monte-Carlo passes too. By default they see every channel that is there: masking is augmentation, and what a row lacks is known."""
    insert: InsertConfig = InsertConfig()
    """Sites added to models that lack them."""
    overrides: dict[str, Rate] = {}
    """Rates by `site` or `site#call` pattern (`*` matches), such as `{"*.layer.11.*": 0.2}`; the last match wins. `site#layer` is a whole layer."""
    domains: dict[str, dict[str, Rate]] = {}
    """Rates by data domain and role, such as `{web: {hidden: 0.3}}`; needs `data.domain_column_name`."""
    concrete: ConcreteConfig = ConcreteConfig()
    """Settings of learned rates."""
    strict: bool = True
    """Randomness outside the plan is an error; false: a warning."""

    def by_role(self) -> dict[str, RoleDropout]:
        """What is given for the model's own sites, by role."""
        given = {name: getattr(self, name) for name in type(self).model_fields}
        return {role: value for role, value in given.items() if isinstance(value, RoleDropout)}

    def rates(self) -> dict[str, float]:
        """The rates given, by role."""
        given = self.by_role().items()
        return {role: value.rate for role, value in given if value.rate is not None}

    def learns(self) -> bool:
        """Whether any rate is learned."""
        given = [*self.by_role().values(), self.insert.embedding, self.insert.hidden]
        return any(role is not None and role.learned for role in given)
