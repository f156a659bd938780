"""Streaming Monte-Carlo sums against the plain formulas on the stack of all passes."""

import numpy as np
import pytest
import torch

from pipeline.errors import ModelError
from pipeline.evaluation.uncertainty import MonteCarloSums, concatenate

T, N, C = 7, 23, 5
FIELDS = ("predictive_entropy", "expected_entropy", "mutual_information", "disagreement")


def passes(scale: float = 2.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(T, N, C, generator=generator)


def accumulate(logits_TNC: torch.Tensor):
    sums = MonteCarloSums()
    for logits in logits_TNC:
        sums.update(logits)
    return sums.result()


def stacked_reference(logits_TNC: torch.Tensor) -> dict[str, np.ndarray]:
    z = logits_TNC.double().numpy()
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    mean = p.mean(0)
    predictive = -(mean * np.log(mean)).sum(-1)
    expected = -(p * np.log(p)).sum(-1).mean(0)
    votes = np.stack([(p.argmax(-1) == c).sum(0) for c in range(C)], axis=-1)
    return {
        "mean_probabilities": mean,
        "confidence": mean.max(-1),
        "prediction": mean.argmax(-1),
        "predictive_entropy": predictive,
        "expected_entropy": expected,
        "mutual_information": predictive - expected,
        "disagreement": 1 - votes.max(-1) / T,
    }


@pytest.mark.parametrize("name", stacked_reference(passes()))
def test_streaming_sums_equal_the_formula_on_all_passes_at_once(name):
    logits = passes()
    result = getattr(accumulate(logits), name).numpy()
    np.testing.assert_allclose(result, stacked_reference(logits)[name], atol=1e-12)


def test_stacked_passes_in_any_chunks_give_the_very_bits_of_single_passes():
    logits = passes()
    chunked = MonteCarloSums()
    for chunk in (logits[:3], logits[3], logits[4:]):
        chunked.update(chunk)
    for name in FIELDS:
        assert torch.equal(getattr(chunked.result(), name), getattr(accumulate(logits), name))


@pytest.mark.parametrize("size", [1, 4, 10])
def test_numbers_do_not_depend_on_how_rows_are_split_into_batches(size):
    logits = passes()
    whole = accumulate(logits)
    joined = concatenate([accumulate(part) for part in logits.split(size, dim=1)])
    for name in FIELDS:
        torch.testing.assert_close(getattr(joined, name), getattr(whole, name), rtol=0, atol=1e-12)


def test_permuting_the_rows_permutes_the_results():
    logits, order = passes(), torch.randperm(N, generator=torch.Generator().manual_seed(1))
    whole, permuted = accumulate(logits), accumulate(logits[:, order])
    for name in FIELDS:
        expected = getattr(whole, name)[order]
        torch.testing.assert_close(getattr(permuted, name), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 30.0, 1000.0])
def test_mutual_information_lies_between_zero_and_the_predictive_entropy(scale):
    result = accumulate(passes(scale))
    assert (result.mutual_information >= 0).all()
    assert (result.mutual_information <= result.predictive_entropy + 1e-12).all()
    assert (result.predictive_entropy <= np.log(C) + 1e-12).all()


def test_equal_passes_leave_no_epistemic_uncertainty():
    result = accumulate(passes()[:1].expand(T, N, C))
    assert result.mutual_information.max() < 1e-12
    assert result.mutual_information.min() == 0  # rounding alone would leave -7e-16
    assert (result.disagreement == 0).all()


def test_contradicting_certain_passes_have_mutual_information_log_two():
    certain = torch.tensor([[[0.0, -torch.inf]], [[-torch.inf, 0.0]]])
    result = accumulate(certain)
    assert result.mutual_information.item() == pytest.approx(np.log(2), abs=1e-12)
    assert result.expected_entropy.item() == 0
    assert result.disagreement.item() == 0.5


def test_log_probabilities_and_logits_are_the_same_thing():
    logits = passes()
    a, b = accumulate(logits), accumulate(logits.double().log_softmax(-1))
    torch.testing.assert_close(a.mutual_information, b.mutual_information, rtol=0, atol=1e-12)


def test_memory_is_that_of_one_pass():
    sums = MonteCarloSums()
    sums.update(passes().bfloat16())
    kept = [value for value in vars(sums).values() if isinstance(value, torch.Tensor)]
    assert max(value.numel() for value in kept) == N * C


def test_the_input_stays_untouched_and_may_require_gradients():
    logits = passes()[0].requires_grad_()
    before = logits.detach().clone()
    result = accumulate(logits[None])
    assert torch.equal(logits.detach(), before)
    assert not result.mean_probabilities.requires_grad


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_logit_is_an_error_that_names_pass_and_row(value):
    logits = passes()
    logits[2, 11, 0] = value
    with pytest.raises(ModelError, match=r"pass 2 .* 1 of 23 rows .*row 11"):
        accumulate(logits)


def test_passes_over_other_rows_are_refused():
    sums = MonteCarloSums()
    sums.update(passes()[0])
    with pytest.raises(ValueError, match="same rows"):
        sums.update(passes()[0, :5])


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4, 5), (3, 0)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="shape"):
        MonteCarloSums().update(torch.zeros(shape))


def test_a_result_without_passes_and_a_join_without_batches_are_refused():
    with pytest.raises(ValueError, match="No pass"):
        MonteCarloSums().result()
    with pytest.raises(ValueError, match="no batches"):
        concatenate([])
