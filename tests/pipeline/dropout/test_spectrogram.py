"""SpecAugment: spans by sample, with the statistics of transformers, in training only."""

import numpy as np
import pytest
import torch
import transformers
from transformers.models.wav2vec2 import modeling_wav2vec2

from pipeline.config.dropout import DropoutConfig
from pipeline.dropout.audit import audited
from pipeline.dropout.context import KeyedDropout
from pipeline.dropout.plan import Blueprint, make_plan
from pipeline.dropout.spectrogram import SpanRequest, keyed_spans
from pipeline.errors import DropoutError, LeakError

RATES = {"mask_time_prob": 0.05, "mask_feature_prob": 0.0, "dropout": 0.0}
WHISPER = {"d_model": 24, "num_mel_bins": 8, "max_source_positions": 16, "vocab_size": 61}
WHISPER |= {f"{part}_{name}": n for part in ("encoder", "decoder")
            for name, n in {"layers": 1, "attention_heads": 3, "ffn_dim": 40}.items()}  # fmt: skip
WHISPER |= {"mask_time_length": 4, "mask_feature_length": 2, "apply_spec_augment": True}
WHISPER |= {"classifier_proj_size": 16, "pad_token_id": 0, "max_target_positions": 16}


def masked(lengths, rate=0.4, mask_length=3, min_masks=0, key=99):
    attended = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    asked = SpanRequest(tuple(attended.shape), rate, mask_length, min_masks, attended)
    rows = len(lengths)
    return keyed_spans(asked, [key] * rows, list(range(rows)), [rate] * rows)


def test_a_sample_has_the_same_spans_in_any_batch():
    together = masked([20, 11, 35, 7])
    for place, length in enumerate([20, 11, 35, 7]):
        asked = SpanRequest((1, length), 0.4, 3, 0, None)
        alone = keyed_spans(asked, [99], [place], [0.4])
        assert np.array_equal(together[place, :length], alone[0])
        assert not together[place, length:].any()


def test_padding_on_the_left_moves_the_spans_along():
    attended = torch.tensor([[0] * 5 + [1] * 15])
    asked = SpanRequest((1, 20), 0.4, 3, 0, attended)
    alone = keyed_spans(SpanRequest((1, 15), 0.4, 3, 0, None), [99], [4], [0.4])
    assert np.array_equal(keyed_spans(asked, [99], [4], [0.4])[0, 5:], alone[0])


@pytest.mark.parametrize(
    ("length", "rate", "mask_length", "min_masks"),
    [(50, 0.05, 10, 2), (49, 0.3, 4, 0), (13, 0.9, 5, 0), (30, 0.065, 10, 0), (9, 0.1, 10, 2)],
)
def test_spans_have_the_statistics_of_transformers(length, rate, mask_length, min_masks):
    np.random.seed(0)  # noqa: NPY002
    attended = torch.ones(1500, 60, dtype=torch.long)
    attended[:, length:] = 0
    theirs = np.concatenate([
        modeling_wav2vec2._compute_mask_indices(
            (1, max(length, mask_length)), rate, mask_length, row[None, : max(length, mask_length)],
            min_masks,
        )
        for row in attended
    ])[:, :length]  # fmt: skip
    asked = SpanRequest((1500, 60), rate, mask_length, min_masks, attended)
    ours = keyed_spans(asked, [7] * 1500, list(range(1500)), [rate] * 1500)[:, :length]
    if length < mask_length:
        assert not ours.any()
        return
    error = np.sqrt(max(theirs.mean(), 1e-3) / 1500)
    assert abs(theirs.sum(1).mean() - ours.sum(1).mean()) < 3 * ours.sum(1).std() / 25 + 1e-9
    assert np.abs(theirs.mean(0) - ours.mean(0)).max() < 6 * error


def test_an_axis_shorter_than_a_span_is_an_error():
    with pytest.raises(DropoutError, match="spans of 10 on an axis of 8; lower mask_time_length"):
        SpanRequest((2, 8), 0.1, 10, 0, None).extents()


def whisper_model(**dropout):
    config = transformers.WhisperConfig(**WHISPER)

    def build(rates):
        for name, rate in rates.items():
            setattr(config, name, rate)
        torch.manual_seed(0)
        return transformers.WhisperModel._from_config(config)

    def example(batch_size, length):
        ids = torch.ones(batch_size, length, dtype=torch.long)
        return {"input_features": torch.zeros(batch_size, 8, 32), "decoder_input_ids": ids}

    blueprint = Blueprint(build, example, dict(RATES), "", False, lambda model: {})
    plan = make_plan(blueprint, DropoutConfig(**dropout))
    model = build(dict(plan.attributes)).train()
    batch = example(2, 3) | {"input_features": torch.ones(2, 8, 32)}
    return KeyedDropout(model, plan, 1), batch


def test_the_callers_features_stay_as_they_are():
    keyed, batch = whisper_model(spectrogram=0.3)
    with keyed.context(purpose="train", index=0, row_ids=torch.arange(2)), torch.no_grad():
        first = keyed.model(**batch).last_hidden_state
    with keyed.context(purpose="train", index=1, row_ids=torch.arange(2)), torch.no_grad():
        second = keyed.model(**batch).last_hidden_state
    assert batch["input_features"].eq(1).all()
    assert not first.equal(second)
    keyed.release()
    assert all("_mask_input_features" not in m.__dict__ for m in keyed.model.modules())


def test_monte_carlo_passes_see_all_features_and_the_plan_says_so():
    keyed, batch = whisper_model(spectrogram=0.3)
    assert any("SpecAugment masks spans in training only" in note for note in keyed.plan.notes)
    outputs = []
    for index in range(2):
        with keyed.context(purpose="mc", index=index, row_ids=torch.arange(2)) as active:
            outputs.append(keyed.model.eval()(**batch).last_hidden_state)
        assert keyed.missing(active) == []
    assert outputs[0].equal(outputs[1])


def test_a_native_draw_left_in_place_is_found_by_the_audit():
    keyed, batch = whisper_model(spectrogram=0.3)
    keyed._span_files = []
    context = keyed.context(purpose="train", index=0, row_ids=torch.arange(2))
    with context as active, audited(keyed.model) as leaks:
        keyed.model(**batch)
    assert "the model (numpy.random)" in map(str, leaks)
    assert keyed.missing(active) == ["#0", "#1"]


def test_spans_outside_a_context_are_an_error_in_training():
    keyed, batch = whisper_model(spectrogram=0.3)
    with pytest.raises(LeakError, match="was asked to drop outside a mask context"):
        keyed.model(**batch)


def test_a_model_without_spectrogram_names_what_is_missing(config_of):
    from pipeline.model import plan_for

    with pytest.raises(DropoutError, match=r"spectrogram is 0\.1, .* needs an audio model with"):
        plan_for(config_of("bert", {"spectrogram": 0.1}))
