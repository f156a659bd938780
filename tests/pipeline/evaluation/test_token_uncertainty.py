"""Streaming token sums of a language model against plain formulas, one token at a time."""

import numpy as np
import pytest
import torch

from pipeline.errors import ModelError
from pipeline.evaluation import token_uncertainty
from pipeline.evaluation.token_uncertainty import IGNORED, TokenSums
from pipeline.evaluation.uncertainty import MonteCarloSums, concatenate

T, B, L, V = 4, 3, 6, 11
TOKEN_FIELDS = ("log_probability", "expected_log_probability", "mutual_information", "confidence")
SAMPLE_FIELDS = ("log_probability", "predictive_entropy", "mutual_information", "perplexity")


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(V, (B, L), generator=generator)
    targets[0, 4:] = IGNORED
    targets[2, 0] = IGNORED
    return 2 * torch.randn(T, B, L, V, generator=generator), targets


def accumulate(logits, targets, **options) -> TokenSums:
    sums = TokenSums(targets, **options)
    for one_pass in logits:
        sums.update(one_pass)
    return sums


def test_every_sample_equals_a_plain_loop_over_its_tokens(batch):
    logits, targets = batch
    result = accumulate(logits, targets).result().per_sample(B)
    for b in range(B):
        valid = [i for i in range(L) if targets[b, i] != IGNORED]
        p = logits[:, b, valid].double().softmax(-1).numpy()
        mean = p.mean(0)
        mutual = -(mean * np.log(mean)).sum(-1) + (p * np.log(p)).sum(-1).mean(0)
        target_log = np.log(mean[range(len(valid)), targets[b, valid].numpy()])
        assert result.num_tokens[b] == len(valid)
        assert result.log_probability[b].item() == pytest.approx(target_log.mean(), abs=1e-12)
        assert result.mutual_information[b].item() == pytest.approx(mutual.mean(), abs=1e-12)
        assert result.perplexity[b].item() == pytest.approx(np.exp(-target_log.mean()), abs=1e-9)


def test_tokens_are_the_rows_of_a_classifier_over_the_vocabulary(batch):
    logits, targets = batch
    sums, rows = accumulate(logits, targets), MonteCarloSums()
    rows.update(logits[:, targets != IGNORED])
    tokens, classes = sums.result(), rows.result()
    for name in ("predictive_entropy", "expected_entropy", "mutual_information", "confidence"):
        torch.testing.assert_close(
            getattr(tokens, name), getattr(classes, name), rtol=0, atol=1e-12
        )
    torch.testing.assert_close(sums.mean_probabilities(), classes.mean_probabilities)


def test_one_pass_gives_the_cross_entropy_of_torch(batch):
    logits, targets = batch
    result = accumulate(logits[:1], targets).result()
    loss = torch.nn.functional.cross_entropy(
        logits[0].double().flatten(0, 1), targets.flatten(), ignore_index=IGNORED
    )
    assert -result.log_probability.mean().item() == pytest.approx(loss.item(), abs=1e-12)
    assert torch.equal(result.mutual_information, torch.zeros_like(result.mutual_information))


def test_the_token_brier_score_is_the_squared_distance_to_the_target(batch):
    logits, targets = batch
    result = accumulate(logits, targets).result()
    mean = logits[:, targets != IGNORED].double().softmax(-1).mean(0)
    one_hot = torch.nn.functional.one_hot(targets[targets != IGNORED], V)
    expected = (mean - one_hot).square().sum(-1)
    torch.testing.assert_close(result.squared_error, expected, rtol=0, atol=1e-12)
    assert torch.equal(result.correct, mean.argmax(-1) == targets[targets != IGNORED])


def test_batch_mates_and_padding_change_nothing(batch):
    logits, targets = batch
    whole = accumulate(logits, targets).result().per_sample(B)
    alone = []
    for b, length in enumerate((4, L, L)):  # row 0 without its padding
        sums = accumulate(logits[:, b : b + 1, :length], targets[b : b + 1, :length])
        alone.append(sums.result().per_sample(1))
    joined = concatenate(alone)
    for name in SAMPLE_FIELDS:
        torch.testing.assert_close(getattr(joined, name), getattr(whole, name), rtol=0, atol=1e-12)


def test_the_chunk_size_changes_nothing(batch, monkeypatch):
    whole = accumulate(*batch).result()
    monkeypatch.setattr(token_uncertainty, "_CHUNK_ELEMENTS", 2 * V)
    chunked = accumulate(*batch).result()
    for name in TOKEN_FIELDS:
        torch.testing.assert_close(getattr(chunked, name), getattr(whole, name), rtol=0, atol=1e-12)


def test_sums_in_float32_stay_within_a_millionth(batch):
    whole = accumulate(*batch).result()
    single = accumulate(*batch, dtype=torch.float32).result()
    for name in TOKEN_FIELDS:
        torch.testing.assert_close(getattr(single, name), getattr(whole, name), rtol=0, atol=2e-6)
    assert (single.mutual_information >= 0).all()


def test_a_target_that_a_float32_probability_cannot_hold_keeps_its_logarithm():
    logits = torch.tensor([[[0.0, -500.0]]])
    result = accumulate([logits, logits - 3], torch.tensor([[1]])).result()
    assert result.log_probability.item() == pytest.approx(-500, abs=1e-9)


def test_a_sample_without_tokens_has_no_mean():
    targets = torch.tensor([[IGNORED, IGNORED], [1, IGNORED]])
    result = accumulate([torch.zeros(2, 2, V)], targets).result().per_sample(2)
    assert result.num_tokens.tolist() == [0, 1]
    assert result.perplexity.isnan().tolist() == [True, False]
    assert result.perplexity[1].item() == pytest.approx(V)


def test_a_batch_without_any_token_has_an_empty_result():
    sums = accumulate([torch.zeros(1, 2, V)], torch.full((1, 2), IGNORED))
    assert len(sums.result().log_probability) == 0


def test_wrong_shapes_missing_passes_and_broken_logits_are_refused(batch):
    logits, targets = batch
    with pytest.raises(ValueError, match=r"\[B, L\]"):
        TokenSums(targets[0])
    with pytest.raises(ValueError, match="targets have shape"):
        TokenSums(targets).update(logits[0, :, 1:])
    with pytest.raises(ValueError, match="No pass"):
        TokenSums(targets).result()
    with pytest.raises(ModelError, match="NaN"):
        TokenSums(targets).update(logits[0] * torch.nan)
