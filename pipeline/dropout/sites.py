"""What a dropout site is, and which role it plays.

The origin of a rate decides: one table of configuration fields serves all families, and only where
several kinds of sites share one field does a site's place in the model have a say.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

ROLE_OF_ATTRIBUTE = {
    # attribute of a Hugging Face or PEFT configuration that carries a rate -> role
    "hidden_dropout_prob": "hidden",
    "hidden_dropout": "hidden",
    "dropout": "hidden",
    "dropout_rate": "hidden",
    "resid_pdrop": "hidden",
    "resid_dropout": "hidden",
    "residual_dropout": "hidden",
    "output_dropout": "hidden",
    "attention_probs_dropout_prob": "attention",
    "attention_dropout": "attention",
    "attention_dropout_prob": "attention",
    "attn_pdrop": "attention",
    "attn_dropout": "attention",
    "activation_dropout": "activation",
    "mlp_dropout": "activation",
    "ffn_dropout": "activation",
    "embd_pdrop": "embedding",
    "embed_dropout": "embedding",
    "embedding_dropout": "embedding",
    "embeddings_dropout": "embedding",
    "emb_pdrop": "embedding",
    "classifier_dropout": "head",
    "classifier_dropout_prob": "head",
    "cls_dropout": "head",
    "seq_classif_dropout": "head",
    "summary_first_dropout": "head",
    "summary_last_dropout": "head",
    "pooler_dropout": "head",
    "final_dropout": "head",
    "lora_dropout": "adapter",
    "feat_proj_dropout": "feature",
    "layerdrop": "layer",
    "encoder_layerdrop": "layer",
    "decoder_layerdrop": "layer",
    "speech_encoder_layerdrop": "layer",
    "drop_path_rate": "path",
    "mask_time_prob": "spectrogram",
    "mask_feature_prob": "spectrogram",
}

SAMPLE_FIRST, SHARED = "sample-first", "shared"
JITTER, MODALITY = "jitter", "modality"
AUGMENTATION = ("spectrogram", "noise", JITTER)
"""Doors that draw in training only, never in Monte-Carlo passes."""
ROLE_OF_DOOR = {"layer": "layer", "path": "path", "spectrogram": "spectrogram"}
ROLE_OF_DOOR |= {JITTER: JITTER, MODALITY: MODALITY}
"""Doors that let in one role only, which is also what they draw."""

_EMBEDDING = re.compile(r"(^|\.)(embeddings?|embed_tokens|emb_dropout|wte|drop)(\.|$)")
_FEED_FORWARD = re.compile(r"(^|\.)(DenseReluDense|dense_relu_dense)(\.|$)")
_CROSS_ATTENTION = re.compile(
    r"(^|\.)(EncDecAttention|encoder_attn|crossattention|cross_attn)(\.|$)"
)


@dataclass(frozen=True)
class Site:
    """One call of one dropout site.

    `site` is the qualified name in the bare model, `call` the number of its call through this door
    within a forward pass; together with the variant they name the site in every mask's key.
    """

    site: str
    call: int
    door: str
    """`module` (nn.Dropout), `functional` (nn.functional.dropout), `inserted`, `path`, `layer`,
    `spectrogram`, `noise`, `jitter` or `modality`."""
    role: str
    variant: str
    rate: float
    in_force: bool
    reason: str
    """Why the site is not in force; empty when it is."""
    layout: str
    """`sample-first`; `shared` where samples have one mask together, keyed by the step; or why the
    tensor's entries cannot be mapped to samples."""
    shape: tuple[int, ...]
    """Shape of one sample's tensor: `(positions, features)`, `(heads, queries, keys)`, ..."""
    share: float = 1.0
    """Part of its role's rate that the model gives it: `DropPath` rises from layer to layer."""
    block_size: int = 1
    """Features under one decision, for the variant `block`."""
    progress: str = "constant"
    """How the rate changes over the steps; `rate` is that of the end."""
    gamma: float = 10.0
    """How fast the progress `curriculum` rises."""
    domains: tuple[tuple[str, float], ...] = ()
    """Rates of data domains that have their own."""
    learned: bool = False
    """Whether `rate` is where a learned rate starts."""
    linears: tuple[str, ...] = ()
    """The linear layers next to a learned site, whose weights its regulariser counts."""
    channels: tuple[tuple[str, float], ...] = ()
    """Modality dropout: the rate of each channel, parts of one draw; `rate` is their sum."""
    in_passes: bool = True
    """Whether Monte-Carlo passes draw here too; augmentation never does."""

    @property
    def label(self) -> str:
        """`site#call`; `site#layer` for a whole layer, `site#jitter` for a router's: the module may
        be a site itself."""
        return f"{self.site}#{self.door if self.door in ('layer', JITTER) else self.call}"

    @property
    def highest_rate(self) -> float:
        """The largest rate that any sample can get."""
        return max([self.rate, *(rate for _, rate in self.domains)])

    @property
    def changes(self) -> str:
        """What there is to know of the rate beside its number, in words; empty when it is fixed."""
        shown = [f"{name} {rate:g}" for name, rate in self.domains]
        if self.progress != "constant":
            shown.insert(0, self.progress)
        return ", ".join(["learned"] if self.learned else shown)

    @property
    def detail(self) -> str:
        """The same for a reader, with the rates of channels."""
        return self.changes or ", ".join(f"{name} {rate:g}" for name, rate in self.channels)

    def to_json(self) -> dict[str, Any]:
        lists = {"shape": list(self.shape), "linears": list(self.linears)}
        tables = {"domains": dict(self.domains), "channels": dict(self.channels)}
        return {**asdict(self), **lists, **tables}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Site":
        tuples = {name: tuple(data.get(name, ())) for name in ("shape", "linears")}
        tables = {name: tuple(data.get(name, {}).items()) for name in ("domains", "channels")}
        return Site(**{**data, **tuples, **tables})


def role_of(
    attribute: str,
    site: str,
    *,
    has_heads: bool,
    is_outside_body: bool,
    is_first_of_stack: bool,
) -> str:
    """The role of a site whose rate comes from the configuration field `attribute`.

    Args:
        attribute: field that carries the rate; "" when the model has it written in.
        site: name of the site in the bare model.
        has_heads: whether the masked tensor has an axis of attention heads.
        is_outside_body: whether the site belongs to a classification head.
        is_first_of_stack: whether the stack itself calls it, before all its other sites.
    """
    role = ROLE_OF_ATTRIBUTE.get(attribute, "hidden")
    if role in ("adapter", "head", "embedding", "activation", "feature"):
        return role
    if has_heads:
        return "attention"
    if _FEED_FORWARD.search(site):
        return "activation"
    if is_outside_body:
        return "head"
    return "embedding" if is_first_of_stack or _EMBEDDING.search(site) else "hidden"


def is_cross_attention(site: str) -> bool:
    """Whether a site's keys come from the encoder."""
    return _CROSS_ATTENTION.search(site) is not None
