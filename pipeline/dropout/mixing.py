"""What makes a sample's result depend on its batch, whatever its masks do: said, not mended."""

from typing import Any

from torch import nn


def mixing_notes(model: nn.Module, names: dict[nn.Module, str]) -> list[str]:
    """One sentence for each kind of layer or loss of this model that mixes samples.

    Args:
        model: as built for training, weights or none.
        names: its modules with their names.
    """
    config = getattr(model, "config", None)
    norms = [n for m, n in names.items() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    capacity = [n for m, n in names.items() if hasattr(m, "expert_capacity")]
    scales = [(n, p) for n, p in model.named_parameters() if n.endswith("logit_scale")]
    contrastive = [n for n, p in scales if p.numel() == 1]  # attention has one a head
    return [
        *_note(norms, "normalise over the batch in training (batch norm)"),
        *_note(capacity, "drop tokens above an expert's capacity, padding counted"),
        *_note(contrastive, "scale a loss that compares the samples of a batch (contrastive)"),
        *_balancing(config),
    ]


def _balancing(config: Any) -> list[str]:
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    balances = getattr(text_config, "router_aux_loss_coef", 0) or 0
    if not balances or not getattr(text_config, "output_router_logits", False):
        return []
    return _note(["the routers' loss (router_aux_loss_coef)"], "balances experts over the batch")


def _note(names: list[str], does: str) -> list[str]:
    if not names:
        return []
    shown = ", ".join(names[:3]) + (f", ... ({len(names)} in all)" if len(names) > 3 else "")
    return [
        f"Samples mix: {shown} {does}; results depend on how the batch is divided, whatever the "
        "masks do."
    ]
