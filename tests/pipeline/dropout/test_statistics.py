"""Ten million draws of the active kernel: the rate, and no correlation along any coordinate."""

import math

import numpy as np
import pytest
import torch

from pipeline.dropout.kernels import rows
from pipeline.dropout.key import derive_key, signed
from pipeline.dropout.philox import threshold

SAMPLES, POSITIONS, FEATURES = 25, 400, 1000
NUM_DRAWS = SAMPLES * POSITIONS * FEATURES
RATES = (0.1, 0.5)


def draw(rate: float, step: int = 7, site: str = "layer.0.dropout") -> np.ndarray:
    """Centred and scaled to variance 1, `[samples, positions, features]`."""
    key = signed(derive_key(42, "train", step, "element", site, 0))
    ids, places = torch.arange(SAMPLES)[:, None] + 3, torch.arange(POSITIONS)[None]
    limits = torch.tensor([[threshold(rate)]]), torch.ones(1, 1)
    ones = torch.ones(SAMPLES, POSITIONS, FEATURES)
    kept = rows(ones, torch.tensor([[key]]), ids, places, *limits).numpy()
    kept -= 1 - rate
    kept /= math.sqrt(rate * (1 - rate))
    return kept


@pytest.fixture(scope="module", params=RATES)
def drawn(request) -> tuple[float, np.ndarray]:
    return request.param, draw(request.param)


def assert_uncorrelated(a: np.ndarray, b: np.ndarray) -> None:
    """The mean product of n independent pairs has a standard deviation of 1 / sqrt(n)."""
    correlation = np.vdot(a.ravel(), b.ravel()) / a.size
    assert abs(correlation) < 3 / math.sqrt(a.size)


def test_the_share_of_kept_values_is_the_rate(drawn):
    _, z = drawn
    assert abs(z.mean(dtype=np.float64)) < 3 / math.sqrt(NUM_DRAWS)


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["samples", "positions", "neighbours"])
@pytest.mark.parametrize("distance", [1, 8])
def test_values_along_an_axis_are_uncorrelated(drawn, axis, distance):
    _, z = drawn
    first, second = [slice(None)] * 3, [slice(None)] * 3
    first[axis], second[axis] = slice(None, -distance), slice(distance, None)
    assert_uncorrelated(z[tuple(first)], z[tuple(second)])


@pytest.mark.parametrize(
    "other", [{"step": 8}, {"site": "layer.1.dropout"}], ids=["steps", "sites"]
)
def test_steps_and_sites_are_uncorrelated(drawn, other):
    rate, z = drawn
    assert_uncorrelated(z, draw(rate, **other))
