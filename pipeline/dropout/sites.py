"""What a dropout site is, and which role it plays: the origin of its rate decides, one table for all families."""

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
}

_EMBEDDING = re.compile(r"(^|\.)(embeddings?|embed_tokens|emb_dropout|wte|drop)(\.|$)")
_FEED_FORWARD = re.compile(r"(^|\.)(DenseReluDense|dense_relu_dense)(\.|$)")
_CROSS_ATTENTION = re.compile(
    r"(^|\.)(EncDecAttention|encoder_attn|crossattention|cross_attn)(\.|$)"
)


@dataclass(frozen=True)
class Site:
    """One call of one dropout site.

    `site` is the qualified name in the bare model, `call` the number of its call through this door within a forward
    pass; together with the variant they name the site in every mask's key.
    """

    site: str
    call: int
    door: str
    """`module` (nn.Dropout), `functional` (nn.functional.dropout) or `inserted`."""
    role: str
    variant: str
    rate: float
    in_force: bool
    reason: str
    """Why the site is not in force; empty when it is."""
    layout: str
    """Where the sample is in the tensor: `sample-first`, or why it cannot be mapped."""
    shape: tuple[int, ...]
    """Shape of the traced tensor without its sample axis: `(positions, features)`, `(heads, queries, keys)`, ..."""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "shape": list(self.shape)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Site":
        return Site(**{**data, "shape": tuple(data["shape"])})


def role_of(
    attribute: str, site: str, call: int, ndim: int, body_prefix: str, has_cls: bool
) -> str:
    """The role of a site whose rate comes from `attribute`.

    Args:
        attribute: configuration field that carries the rate.
        site: name of the site in the bare model.
        call: number of the call.
        ndim: dimensions of the masked tensor (4: attention probabilities).
        body_prefix: name of the body inside a model with a head (`bert`), or "".
        has_cls: whether the model has a classification head.
    """
    role = ROLE_OF_ATTRIBUTE.get(attribute, "hidden")
    if role in ("adapter", "head", "embedding", "activation"):
        return role
    if ndim == 4:
        return "attention"
    if _FEED_FORWARD.search(site):
        return "activation"
    in_body = not body_prefix or site == body_prefix or site.startswith(body_prefix + ".")
    if has_cls and not in_body:
        return "head"
    is_stack = site.rsplit(".", 1)[-1] in ("encoder", "decoder") and call == 0
    is_t5_input = re.fullmatch(r"(.*\.)?(encoder|decoder)\.dropout", site) is not None and call == 0
    if _EMBEDDING.search(site) or is_stack or is_t5_input:
        return "embedding"
    return "hidden"


def is_cross_attention(site: str) -> bool:
    """Whether a site's keys come from the encoder."""
    return _CROSS_ATTENTION.search(site) is not None
