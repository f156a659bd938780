"""Out-of-distribution scores from the logits [N, C] of one plain pass. Higher = more OOD."""

from torch import Tensor

from pipeline.evaluation import uncertainty


def msp(logits: Tensor) -> Tensor:
    """1 - max_c p_c, the maximum softmax probability negated, [N].

    Hendrycks & Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples",
    ICLR 2017. Computed as S / (1 + S) with S = sum_{c != m} exp(z_c - z_m), since 1 - p rounds very
    confident rows to ties.
    """
    logits = logits.double()
    highest, winner = logits.max(dim=-1, keepdim=True)
    others = (logits - highest).exp().scatter(-1, winner, 0.0).sum(dim=-1)
    return others / (1 + others)


def max_logit(logits: Tensor) -> Tensor:
    """-max_c z_c, [N].

    Hendrycks et al., "Scaling Out-of-Distribution Detection for Real-World Settings", ICML 2022.
    """
    return -logits.double().amax(dim=-1)


def energy(logits: Tensor) -> Tensor:
    """-log sum_c exp z_c (temperature 1), [N].

    Liu et al., "Energy-based Out-of-distribution Detection", NeurIPS 2020
    (github.com/wetliu/energy_ood).
    """
    return -logits.double().logsumexp(dim=-1)


def entropy(logits: Tensor) -> Tensor:
    """-sum_c p_c log p_c in nats, [N], of the softmax without dropout."""
    return uncertainty.entropy(logits.double().softmax(dim=-1))
