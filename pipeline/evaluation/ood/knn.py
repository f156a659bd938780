"""Distance to the k-th nearest training row, on features scaled to length 1.

    score(x) = || z(x) - z_(k) ||,  z = feature / ||feature||

Sun, Ming, Zhu & Li, "Out-of-Distribution Detection with Deep Nearest Neighbors", ICML 2022
(github.com/deeplearning-wisc/knn-ood). Labels are not used.
"""

import torch
from torch import Tensor

from pipeline.evaluation.ood.checks import check_features

_CHUNK_ELEMENTS = 2**22  # float64 similarities of one chunk stay below 32 MiB


class NearestNeighbours:
    """Keeps the unit-length training features in float64; exact search, a chunk of rows at a time.

    Args:
        num_neighbours: k; a row that was itself fitted finds itself first.
    """

    def __init__(self, num_neighbours: int = 10) -> None:
        if num_neighbours < 1:
            raise ValueError(f"num_neighbours is at least 1; got {num_neighbours}.")
        self.num_neighbours = num_neighbours

    def fit(self, features: Tensor, labels: Tensor | None = None) -> "NearestNeighbours":
        """Features [N, D] of in-distribution training rows, N >= k; labels are ignored."""
        check_features(features, "fit")
        if len(features) < self.num_neighbours:
            raise ValueError(
                f"The distance to neighbour {self.num_neighbours} was asked for, but only "
                f"{len(features)} training rows were given; lower evaluation.knn_neighbours."
            )
        self._reference = _unit_length(features)
        return self

    def score(self, features: Tensor) -> Tensor:
        """Euclidean distance to neighbour k, [N] float64, between 0 and 2."""
        check_features(features, "score", num_dimensions=self._reference.shape[1])
        rows = max(1, _CHUNK_ELEMENTS // len(self._reference))
        parts = [self._distance(part) for part in _unit_length(features).split(rows)]
        return torch.cat(parts)

    def state(self) -> dict[str, Tensor]:
        """What was fitted, as named tensors."""
        return {"reference": self._reference, "k": torch.tensor(self.num_neighbours)}

    @classmethod
    def restored(cls, state: dict[str, Tensor]) -> "NearestNeighbours":
        """The fitted detector that had this state."""
        detector = cls(int(state["k"]))
        detector._reference = state["reference"]
        return detector

    def _distance(self, unit: Tensor) -> Tensor:
        cosine = unit @ self._reference.T
        neighbour = cosine.topk(self.num_neighbours, dim=1).indices[:, -1]
        # sqrt(2 - 2 cos) would lose half the digits of a small distance
        return (unit - self._reference[neighbour]).norm(dim=1)


def _unit_length(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.detach().double(), dim=1)
