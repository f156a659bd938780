"""Mahalanobis distance to the nearest class, with one covariance for all classes.

    score(x) = min_c (x - mu_c)^T Sigma^-1 (x - mu_c)

Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples", NeurIPS 2018
(github.com/pokaxpoka/deep_Mahalanobis_detector). For language models, without labels: one class.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.evaluation.ood.checks import check_features


@dataclass(frozen=True)
class Moments:
    """Class counts [C], class sums [C, D] and the second moment sum x x^T [D, D], in float64.

    They add up: moments of parts of the data, or of several processes, are merged by `+`.
    """

    counts: Tensor
    sums: Tensor
    second: Tensor

    @classmethod
    def of(cls, features: Tensor, labels: Tensor | None = None, num_classes: int = 1) -> "Moments":
        """Moments of one batch: features [N, D], labels [N] int64 or None for a single class."""
        x = features.detach().double()
        if labels is None:
            labels = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        sums = x.new_zeros(num_classes, x.shape[1]).index_add_(0, labels, x)
        return cls(torch.bincount(labels, minlength=num_classes), sums, x.T @ x)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            self.counts + other.counts, self.sums + other.sums, self.second + other.second
        )


class Mahalanobis:
    """Fit once in float64; then whiten rows by one product, and meet all classes in another.

    The covariance is shrunk, (1 - w) S + w (tr S / D) I, which keeps it invertible with fewer rows
    than dimensions. By default w is the OAS weight (Chen, Wiesel, Eldar & Hero, "Shrinkage
    Algorithms for MMSE Covariance Estimation", 2010): large for few rows, near 0 for many.

    Args:
        shrinkage: w between 0 and 1, or None for OAS.
    """

    def __init__(self, shrinkage: float | None = None) -> None:
        if shrinkage is not None and not 0 <= shrinkage <= 1:
            raise ValueError(f"shrinkage is between 0 and 1, or None for OAS; got {shrinkage}.")
        self.shrinkage = shrinkage

    def fit(self, features: Tensor, labels: Tensor | None = None) -> "Mahalanobis":
        """Features [N, D] and labels [N] of training rows; labels None: one class."""
        check_features(features, "fit", labels)
        num_classes = 1 if labels is None else int(labels.max()) + 1
        return self.fit_moments(Moments.of(features, labels, num_classes))

    def fit_moments(self, moments: Moments) -> "Mahalanobis":
        """The same from sums. A class without rows has no mean; a single row is its mean."""
        seen = moments.counts > 0
        if not seen.any():
            raise ValueError("Mahalanobis needs at least one row to fit; the moments have none.")
        means_CD = moments.sums[seen] / moments.counts[seen, None]
        self._centre = moments.sums.sum(dim=0) / moments.counts.sum()
        covariance = self._shrunk(_scatter(moments, means_CD), moments)
        factor = torch.linalg.cholesky(covariance)
        identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        self._whitening = torch.linalg.solve_triangular(
            factor, identity, upper=False
        ).T.contiguous()
        self._white_means = (means_CD - self._centre) @ self._whitening
        return self

    def score(self, features: Tensor) -> Tensor:
        """Squared distance to the nearest class mean, [N] float64.

        With y = W x, m_c = W mu_c (both relative to the grand mean): |y|^2 - 2 y.m_c + |m_c|^2.
        The products run in the features' own precision, at least float32: features in float32 know
        no more.
        """
        check_features(features, "score", num_dimensions=len(self._centre))
        dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
        white = (features.detach() - self._centre).to(dtype) @ self._whitening.to(dtype)
        means = self._white_means.to(dtype)
        offsets = torch.addmm(means.square().sum(dim=1), white, means.T, alpha=-2).amin(dim=1)
        return (white.square().sum(dim=1) + offsets).double().clamp(min=0)

    def state(self) -> dict[str, Tensor]:
        """What was fitted, as named tensors."""
        return {name: getattr(self, f"_{name}") for name in ("centre", "whitening", "white_means")}

    @classmethod
    def restored(cls, state: dict[str, Tensor]) -> "Mahalanobis":
        """The fitted detector that had this state."""
        detector = cls()
        for name, tensor in state.items():
            setattr(detector, f"_{name}", tensor)
        return detector

    def _shrunk(self, scatter: Tensor, moments: Moments) -> Tensor:
        degrees = max(int(moments.counts.sum()) - int((moments.counts > 0).sum()), 1)
        covariance = scatter / degrees
        level = covariance.diagonal().mean()
        identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
        if level <= 1e-12 * moments.second.diagonal().mean() / moments.counts.sum():
            return identity  # every row is its class's mean: Euclidean distance is all that is left
        weight = oas_weight(covariance, degrees) if self.shrinkage is None else self.shrinkage
        return (1 - weight) * covariance + weight * level * identity


def oas_weight(covariance: Tensor, num_rows: int) -> float:
    """Chen et al. 2010, equation 23, in scikit-learn's form for large D; at least 1e-6."""
    mean_square, level = covariance.square().mean(), covariance.diagonal().mean()
    excess = mean_square - level.square() / len(covariance)
    if excess <= 0:
        return 1.0
    weight = (mean_square + level.square()) / ((num_rows + 1) * excess)
    return float(weight.clamp(min=1e-6, max=1.0))


def _scatter(moments: Moments, means_CD: Tensor) -> Tensor:
    """sum over rows of (x - mu_c)(x - mu_c)^T, [D, D]."""
    weighted = moments.sums[moments.counts > 0]
    scatter = moments.second - weighted.T @ means_CD
    return (scatter + scatter.T) / 2
