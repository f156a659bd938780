"""Time of the Mahalanobis score at C=150, D=768, B=1024, against a loop over the classes.

Run: python benchmarks/mahalanobis.py [--threads N]. Both are timed alternately, 20 times each.
"""

import argparse
from statistics import median

import torch
from _timing import wall_seconds
from torch import Tensor

from pipeline.evaluation.ood.mahalanobis import Mahalanobis

NUM_CLASSES, NUM_FEATURES, NUM_ROWS, NUM_REPEATS = 150, 768, 1024, 20


def loop_score(rows_BD: Tensor, means_CD: Tensor, precision_DD: Tensor) -> Tensor:
    """One class after the other, with the inverse covariance: how peers do it."""
    distances = []
    for mean_D in means_CD:
        difference = rows_BD - mean_D
        distances.append(((difference @ precision_DD) * difference).sum(dim=1))
    return torch.stack(distances, dim=1).amin(dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(20 * NUM_CLASSES) % NUM_CLASSES
    centres = 3 * torch.randn(NUM_CLASSES, NUM_FEATURES, generator=generator)
    noise = torch.randn(len(labels), NUM_FEATURES, generator=generator)
    features = centres[labels] + noise
    rows = 2 * torch.randn(NUM_ROWS, NUM_FEATURES, generator=generator)

    ours = Mahalanobis(shrinkage=0.1).fit(features, labels)
    sums = torch.zeros(NUM_CLASSES, NUM_FEATURES).index_add_(0, labels, features)
    means = sums / torch.bincount(labels)[:, None]
    residuals = (features - means[labels]).double()
    covariance = residuals.T @ residuals / (len(labels) - NUM_CLASSES)
    shrunk = 0.9 * covariance + 0.1 * covariance.diagonal().mean() * torch.eye(NUM_FEATURES)
    precision = torch.linalg.inv(shrunk).float()

    reference = loop_score(rows, means, precision).double()
    error = ((ours.score(rows) - reference).abs() / reference).max().item()
    times = [
        (
            wall_seconds(lambda: ours.score(rows)),
            wall_seconds(lambda: loop_score(rows, means, precision)),
        )
        for _ in range(NUM_REPEATS)
    ]
    fast, slow = (median(column) for column in zip(*times, strict=True))
    print(f"threads {torch.get_num_threads()}, float32, largest relative difference {error:.1e}")
    print(f"whitened, one product for all classes  {1e3 * fast:9.1f} ms")
    print(f"loop over the classes                  {1e3 * slow:9.1f} ms")
    print(f"ratio                                  {slow / fast:9.1f}")


if __name__ == "__main__":
    main()
