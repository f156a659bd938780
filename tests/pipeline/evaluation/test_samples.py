"""Columns of scored rows that no oracle library has, each against plain arithmetic."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from PIL import Image

from pipeline.corpora.digits import png
from pipeline.errors import DataError
from pipeline.evaluation.batches import batch_keys, batches_again, by_length
from pipeline.evaluation.predict_classes import ClassPrediction
from pipeline.evaluation.samples import Origin, samples_of, scored_table
from pipeline.evaluation.uncertainty import MonteCarloSums
from pipeline.modality.language import described_text, unknown_token

LENGTHS, IDS = [3, 9, 5, 5, 7], [40, 10, 30, 50, 20]


@pytest.fixture
def table():
    """Three rows, the last without a label, of which one holds unknown tokens."""
    passes, plain = MonteCarloSums(), MonteCarloSums()
    logits = torch.tensor([[4.0, 0.0], [0.0, 2.0], [0.0, 800.0]])
    passes.update(torch.stack([logits, 2 * logits]))
    plain.update(logits)
    prediction = ClassPrediction(
        sample_ids=torch.tensor([7, 8, 9]),
        features=torch.arange(6.0).reshape(3, 2),
        logits=logits,
        labels=torch.tensor([0, 0, -1]),
        plain=plain.result(),
        monte_carlo=passes.result(),
    )
    rows = Dataset.from_dict(
        {"text": ["a" * 600, "b", "c"], "input_ids": [[2, 5, 1, 1], [2, 5], [2]]}
    )
    tokenizer = SimpleNamespace(unk_token_id=1, eos_token_id=2, bos_token_id=None, pad_token_id=0)
    origin = Origin(("cat", "dog"), 2.0, lambda rows: described_text(rows, tokenizer))
    return scored_table(prediction, rows, [[0, 1], [2]], {"energy": np.zeros(3)}, origin)


def test_each_row_says_what_came_in(table):
    assert table["sample_id"].to_pylist() == [7, 8, 9]
    assert table["num_tokens"].to_pylist() == [4, 2, 1]
    assert table["unknown_token_share"].to_pylist() == [0.5, 0.0, 0.0]
    assert table["embedding"].to_pylist() == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    first, second, third = table["batch_key"].to_pylist()
    assert first == second != third


def test_each_row_says_how_sure_the_model_is_of_the_label(table):
    def mean(logit):
        return (1 / (1 + np.exp(-logit)) + 1 / (1 + np.exp(-2 * logit))) / 2

    found = table["label_log_probability"].to_pylist()
    assert found[:2] == pytest.approx([np.log(mean(4.0)), np.log(1 - mean(2.0))])
    assert found[2] is None
    assert table["correct"].to_pylist() == [True, False, None]
    p = mean(4.0)
    assert table["calibrated_confidence"][0].as_py() == pytest.approx(
        p**0.5 / (p**0.5 + (1 - p) ** 0.5)
    )
    assert np.isfinite(table["calibrated_confidence"].to_numpy()).all()


def test_samples_of_an_evaluation_stay_small(table):
    samples = samples_of("test", table)
    assert samples.column_names[:3] == ["sample_id", "split", "text"]
    assert {"embedding", "batch_key"}.isdisjoint(samples.column_names)
    assert len(samples["text"][0].as_py()) == 500
    assert samples["split"].to_pylist() == ["test"] * 3


@pytest.mark.parametrize(("unknown", "expected"), [(1, 1), (None, None), (50, None)])
def test_an_end_token_that_is_called_unknown_is_none(unknown, expected):
    tokenizer = SimpleNamespace(
        unk_token_id=unknown, eos_token_id=50, bos_token_id=50, pad_token_id=None
    )
    assert unknown_token(tokenizer) == expected


# -- batches -------------------------------------------------------------------------------------


def test_rows_of_like_length_run_together_the_longest_first():
    assert by_length(LENGTHS, 2) == [[1, 4], [2, 3], [0]]


def test_rows_find_their_batch_again_wherever_they_are():
    keys = batch_keys(IDS, by_length(LENGTHS, 2))
    moved = [3, 1, 0, 4, 2]  # 2 and 3 of one length: their order decides
    ids, lengths, moved_keys = ([values[n] for n in moved] for values in (IDS, LENGTHS, keys))
    assert batches_again(ids, lengths, moved_keys, [3]) == [[1, 3]]
    assert batches_again(IDS, LENGTHS, keys, [0, 3]) == [[0], [2, 3]]
    with pytest.raises(DataError, match="Sample 50 .* missing here, or are in another order"):
        batches_again(ids, lengths, moved_keys, [0])


def test_keys_survive_json_and_float64():
    keys = batch_keys(list(range(1000)), [[n] for n in range(1000)])
    assert len(set(keys)) == 1000
    assert [int(float(key)) for key in keys] == keys == json.loads(json.dumps(keys))
    assert pa.array(keys).type == pa.int64()


def test_the_most_uncertain_images_are_kept_small_and_no_other():
    random = np.random.default_rng(1)
    pixels = [random.integers(0, 255, (300, 200, 3), dtype=np.uint8) for _ in range(25)]
    entropies = random.random(25)
    scored = pa.table(
        {
            "sample_id": pa.array(range(25), pa.int64()),
            "text": [""] * 25,
            "predictive_entropy": entropies,
            "image": [{"bytes": png(image), "path": None} for image in pixels],
        }
    )
    found = samples_of("test", scored)
    kept = [place for place, small in enumerate(found["thumbnail"].to_pylist()) if small]
    assert kept == sorted(np.argsort(-entropies)[:20].tolist())
    small = Image.open(io.BytesIO(found["thumbnail"][kept[0]].as_py()))
    assert max(small.size) == 64
    assert "image" not in found.column_names
