"""The contract every OOD score passes, each formula against a plain one, and the verdict."""

import numpy as np
import pytest
import torch
from scipy.special import logsumexp, softmax
from scipy.stats import entropy

from pipeline.evaluation.fitted import Fitted, read_fitted, write_fitted
from pipeline.evaluation.ood import (
    SCORES,
    Score,
    compare_scores,
    fit_detectors,
    register,
    score_rows,
)
from pipeline.evaluation.ood import logits as logit_scores
from pipeline.evaluation.token_uncertainty import TokenSums
from pipeline.evaluation.uncertainty import MonteCarloSums
from pipeline.records import RunFolder

N, C, D = 40, 4, 6
CLASSIFIER = {
    *("msp", "max_logit", "energy", "entropy", "mahalanobis", "knn", "mc_msp"),
    *("mc_predictive_entropy", "mc_expected_entropy", "mc_mutual_information", "mc_disagreement"),
}
LANGUAGE_MODEL = {
    *("surprise", "token_entropy", "mahalanobis", "knn", "mc_surprise"),
    *("mc_predictive_entropy", "mc_expected_entropy", "mc_mutual_information"),
}


def classifier_sources(seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    passes = torch.randn(5, N, C, generator=generator)
    sums = MonteCarloSums()
    sums.update(passes)
    features = torch.randn(N, D, generator=generator)
    return {"logits": passes[0], "monte_carlo": sums.result(), "features": features}


def language_model_sources() -> dict:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(7, (N, 3), generator=generator)
    sums, plain = TokenSums(targets), TokenSums(targets)
    plain.update(torch.randn(N, 3, 7, generator=generator))
    for _ in range(3):
        sums.update(torch.randn(N, 3, 7, generator=generator))
    return {
        "tokens": plain.result().per_sample(N),
        "monte_carlo_tokens": sums.result().per_sample(N),
        "features": torch.randn(N, D, generator=generator),
    }


def detectors() -> dict:
    generator = torch.Generator().manual_seed(9)
    features = torch.randn(100, D, generator=generator)
    return fit_detectors(features, torch.arange(100) % C, num_neighbours=5)


def test_a_classifier_gets_every_score_that_applies_to_it():
    assert set(score_rows(classifier_sources(), detectors())) == CLASSIFIER


def test_a_language_model_gets_the_token_scores_and_one_class():
    fitted = fit_detectors(torch.randn(30, D), num_neighbours=3)
    assert set(score_rows(language_model_sources(), fitted)) == LANGUAGE_MODEL


def test_without_detectors_feature_scores_are_left_out():
    assert set(score_rows(classifier_sources())) == CLASSIFIER - {"mahalanobis", "knn"}


def test_every_detector_is_restored_to_the_last_bit(tmp_path):
    run, fitted = RunFolder(tmp_path), Fitted("v1", detectors(), 1.25)
    write_fitted(run, fitted)
    found = read_fitted(run, "v1")
    assert found.temperature == 1.25
    assert set(found.detectors) == {name for name, score in SCORES.items() if score.detector}
    expected = score_rows(classifier_sources(), fitted.detectors)
    for name, values in score_rows(classifier_sources(), found.detectors).items():
        np.testing.assert_array_equal(values, expected[name])


def test_detectors_score_batches_each_in_its_place():
    batches = torch.randperm(N).split(7)
    found = score_rows(classifier_sources(), detectors(), [part.tolist() for part in batches])
    for name, values in score_rows(classifier_sources(), detectors()).items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(SCORES))
def test_every_score_gives_one_finite_float64_a_row_twice_the_same(name):
    sources = classifier_sources() | language_model_sources()
    first, second = (score_rows(sources, detectors())[name] for _ in range(2))
    assert first.shape == (N,)
    assert first.dtype == np.float64
    assert np.isfinite(first).all()
    assert np.array_equal(first, second)


@pytest.mark.parametrize("name", ["msp", "max_logit", "energy", "entropy", "mahalanobis", "knn"])
def test_scores_leave_their_input_alone_and_follow_the_rows(name):
    sources, fitted = classifier_sources(), detectors()
    copies = {key: sources[key].clone() for key in ("logits", "features")}
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    scores = score_rows(sources, fitted)[name]
    permuted = score_rows({key: value[order] for key, value in copies.items()}, fitted)[name]
    np.testing.assert_allclose(permuted, scores[order], rtol=1e-5)
    assert all(torch.equal(sources[key], value) for key, value in copies.items())


def test_the_logit_scores_equal_scipy():
    z = classifier_sources()["logits"]
    p = softmax(z.double().numpy(), axis=1)
    np.testing.assert_allclose(logit_scores.msp(z), 1 - p.max(1), atol=1e-12)
    np.testing.assert_allclose(logit_scores.max_logit(z), -z.numpy().max(1))
    np.testing.assert_allclose(logit_scores.energy(z), -logsumexp(z.double().numpy(), axis=1))
    np.testing.assert_allclose(logit_scores.entropy(z), entropy(p, axis=1), atol=1e-12)


def test_msp_still_ranks_rows_whose_probability_rounds_to_one():
    scores = logit_scores.msp(torch.tensor([[50.0, 0.0], [60.0, 0.0], [70.0, 0.0]]))
    assert (scores.diff() < 0).all()
    assert scores[0].item() == pytest.approx(np.exp(-50), rel=1e-12)


def test_scores_are_higher_where_the_model_knows_less():
    certain, unsure = torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.5, 0.0]])
    for function in (
        logit_scores.msp,
        logit_scores.max_logit,
        logit_scores.energy,
        logit_scores.entropy,
    ):
        assert function(unsure).item() > function(certain).item()


def test_which_scores_need_monte_carlo_passes_is_marked():
    needing = {name for name, score in SCORES.items() if score.needs_mc}
    assert needing == {name for name in SCORES if name.startswith("mc_")}


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (Score("msp", ("logits",), logit_scores.msp), "exists already"),
        (Score("new", ("pixels",), logit_scores.msp), "sources are"),
        (Score("new", ("logits",)), "exactly one"),
    ],
)
def test_a_registration_that_is_a_duplicate_or_makes_no_sense_is_refused(score, message):
    with pytest.raises(ValueError, match=message):
        register(score)
    assert "new" not in SCORES


def test_an_unknown_source_is_refused():
    with pytest.raises(ValueError, match="Unknown sources"):
        score_rows({"logit": torch.zeros(1, 2)})


def contest(mc_shift: float, plain_shift: float) -> dict:
    rng = np.random.default_rng(0)
    inside = {"energy": rng.normal(size=300), "mc_msp": rng.normal(size=300)}
    noise = rng.normal(size=200)
    outside = {"energy": noise + plain_shift, "mc_msp": noise + mc_shift}
    return compare_scores(inside, outside, set_name="set", seed=0, num_resamples=200)


@pytest.mark.parametrize(
    ("mc_shift", "plain_shift", "best", "relation"),
    [
        (2.0, 0.5, "mc_msp", "beats"),
        (0.5, 2.0, "energy", "loses to"),
        (1.0, 1.0, None, "ties with"),
    ],
)
def test_the_verdict_names_the_winner_and_how_monte_carlo_did(
    mc_shift, plain_shift, best, relation
):
    section = contest(mc_shift, plain_shift)
    assert section["best"] == (best or section["best"])
    assert section["best"] in section["verdict"]
    assert f"{relation} the best single-pass score, energy" in section["verdict"]
    assert section["mc_beats_deterministic"] == (relation == "beats")


def test_the_verdict_states_the_difference_of_the_two_figures():
    section = contest(2.0, 0.5)
    difference = section["scores"]["mc_msp"]["auroc"] - section["scores"]["energy"]["auroc"]
    assert f"difference {difference:+.3f}, interval +0." in section["verdict"]


def test_a_section_holds_each_figure_inside_its_interval():
    section = contest(1.0, 1.0)
    assert (section["best_mc"], section["best_deterministic"]) == ("mc_msp", "energy")
    for entry in section["scores"].values():
        assert entry["auroc_interval"][0] < entry["auroc"] < entry["auroc_interval"][1]
        assert entry["fpr95_interval"][0] <= entry["fpr95"] <= entry["fpr95_interval"][1]
        assert {"aupr_in", "aupr_out"} < set(entry)


def test_without_monte_carlo_scores_there_is_no_contest():
    section = compare_scores({"knn": [0, 1]}, {"knn": [2, 3]}, set_name="far", seed=0)
    assert section["best_mc"] is None
    assert section["mc_beats_deterministic"] is False
    assert section["verdict"].startswith("far: knn separates it best (AUROC 1.000")
    assert "Monte-Carlo" not in section["verdict"]


def test_scores_that_differ_between_the_sets_or_are_unknown_are_refused():
    with pytest.raises(ValueError, match="same scores"):
        compare_scores({"knn": [1.0]}, {"msp": [1.0]}, set_name="x", seed=0)
    with pytest.raises(ValueError, match="not registered"):
        compare_scores({"magic": [1.0]}, {"magic": [1.0]}, set_name="x", seed=0)
