"""Mahalanobis and nearest neighbours against per-row loops, scikit-learn and scipy."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import oas
from sklearn.neighbors import NearestNeighbors

from pipeline.evaluation.ood.knn import NearestNeighbours
from pipeline.evaluation.ood.mahalanobis import Mahalanobis, Moments, oas_weight

C, D = 3, 5


def training(num_rows: int = 60, num_classes: int = C) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num_rows) % num_classes
    mixing = torch.randn(D, D, generator=generator).double()
    noise = torch.randn(num_rows, D, generator=generator).double() @ mixing
    return noise + 4 * labels[:, None] + 10, labels


def new_rows(num_rows: int = 17) -> torch.Tensor:
    return 6 * torch.randn(num_rows, D, generator=torch.Generator().manual_seed(1)).double() + 12


def loop_reference(features, labels, rows, shrinkage) -> np.ndarray:
    x, y = features.numpy(), labels.numpy()
    means = [x[y == c].mean(0) for c in np.unique(y)]
    residuals = np.concatenate([x[y == c] - x[y == c].mean(0) for c in np.unique(y)])
    covariance = residuals.T @ residuals / (len(x) - len(means))
    level = np.trace(covariance) / D * np.eye(D)
    inverse = np.linalg.inv((1 - shrinkage) * covariance + shrinkage * level)
    return np.array([min(mahalanobis(r, m, inverse) ** 2 for m in means) for r in rows.numpy()])


@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 1.0])
def test_mahalanobis_equals_a_loop_over_rows_and_classes(shrinkage):
    features, labels = training()
    result = Mahalanobis(shrinkage).fit(features, labels).score(new_rows())
    expected = loop_reference(features, labels, new_rows(), shrinkage)
    np.testing.assert_allclose(result, expected, rtol=1e-9)


def test_without_labels_there_is_one_class():
    features, _ = training()
    one = torch.zeros(len(features), dtype=torch.int64)
    a, b = (Mahalanobis().fit(features, labels) for labels in (None, one))
    assert torch.equal(a.score(new_rows()), b.score(new_rows()))


def test_the_shrinkage_weight_is_that_of_scikit_learn():
    x = training()[0].numpy()
    centred = x - x.mean(0)
    covariance = torch.tensor(centred.T @ centred / len(x))
    assert oas_weight(covariance, len(x)) == pytest.approx(oas(x)[1])


def test_float32_features_keep_six_digits():
    features, labels = training()
    fitted = Mahalanobis().fit(features.float(), labels)
    reference = Mahalanobis().fit(features, labels).score(new_rows())
    np.testing.assert_allclose(fitted.score(new_rows().float()), reference, rtol=1e-4)
    np.testing.assert_allclose(fitted.score(new_rows().bfloat16()), reference, rtol=0.1)


def test_moments_of_parts_add_up_to_those_of_the_whole():
    features, labels = training()
    parts = [Moments.of(x, y, C) for x, y in zip(features.split(7), labels.split(7), strict=True)]
    merged = Mahalanobis().fit_moments(sum(parts[1:], parts[0]))
    whole = Mahalanobis().fit(features, labels)
    torch.testing.assert_close(merged.score(new_rows()), whole.score(new_rows()), rtol=1e-9, atol=0)


def test_a_class_without_rows_attracts_nobody():
    features, labels = training()
    gap = torch.where(labels == 2, 7, labels)  # classes 2 to 6 have no rows
    a, b = (Mahalanobis().fit(features, y).score(new_rows()) for y in (labels, gap))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_a_class_of_one_row_is_its_own_mean():
    features, labels = training()
    lone = torch.full((1, D), 500.0, dtype=torch.float64)
    fitted = Mahalanobis().fit(torch.cat([features, lone]), torch.cat([labels, torch.tensor([C])]))
    assert fitted.score(lone).item() == pytest.approx(0, abs=1e-6)


def test_classes_of_one_row_each_leave_the_euclidean_distance():
    features, labels = training(num_rows=4, num_classes=4)
    result = Mahalanobis().fit(features, labels).score(new_rows())
    expected = torch.cdist(new_rows(), features).square().amin(dim=1)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_rows", [1, 2, 4])
def test_fewer_rows_than_dimensions_still_rank_far_rows_above_near_ones(num_rows):
    features = training()[0][:num_rows]
    fitted = Mahalanobis().fit(features)
    near, far = fitted.score(torch.stack([features[0], features[0] + 1000]))
    assert torch.isfinite(far)
    assert far > near


def test_constant_features_and_zero_features_are_no_obstacle():
    features, labels = training()
    features[:, 0] = 3.0
    assert Mahalanobis().fit(features, labels).score(features).isfinite().all()
    zeros = torch.zeros(4, D)
    assert Mahalanobis().fit(zeros).score(zeros).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("k", [1, 5, 60])
def test_knn_equals_scikit_learn_on_unit_vectors(k):
    train, rows = (x / x.norm(dim=1, keepdim=True) for x in (training()[0], new_rows()))
    expected = NearestNeighbors(n_neighbors=k).fit(train.numpy()).kneighbors(rows.numpy())[0][:, -1]
    result = NearestNeighbours(k).fit(training()[0]).score(new_rows())
    np.testing.assert_allclose(result, expected, rtol=1e-9)


def test_knn_ignores_length_and_finds_a_fitted_row_at_distance_zero():
    features = training()[0]
    fitted = NearestNeighbours(1).fit(features)
    assert fitted.score(3 * features).max() < 1e-12


def test_knn_in_small_chunks_gives_the_same(monkeypatch):
    whole = NearestNeighbours(3).fit(training()[0]).score(new_rows())
    monkeypatch.setattr("pipeline.evaluation.ood.knn._CHUNK_ELEMENTS", 120)
    chunked = NearestNeighbours(3).fit(training()[0]).score(new_rows())
    torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("make", [Mahalanobis, NearestNeighbours])
def test_detectors_score_no_rows_and_refuse_bad_ones(make):
    features, labels = training()
    fitted = make().fit(features, labels)
    assert fitted.score(features[:0]).shape == (0,)
    with pytest.raises(ValueError, match="fitted on 5 features a row; got 4"):
        fitted.score(features[:, :4])
    with pytest.raises(ValueError, match="NaN or infinite in 1 of 60 rows"):
        fitted.score(torch.where(torch.arange(60)[:, None] == 3, torch.nan, features))
    with pytest.raises(ValueError, match=r"shape \[N, D\]"):
        make().fit(features[:0])


def test_impossible_settings_are_refused():
    features, labels = training()
    with pytest.raises(ValueError, match="only 60 training rows"):
        NearestNeighbours(61).fit(features)
    with pytest.raises(ValueError, match="at least 1"):
        NearestNeighbours(0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        Mahalanobis(1.5)
    with pytest.raises(ValueError, match="for 60 rows"):
        Mahalanobis().fit(features, labels[:3])
