"""Language tasks: rows to batches, losses against torch, sums against whole-set metrics."""

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from pipeline.config.schema import RunConfig
from pipeline.errors import ModelError
from pipeline.modality import MODALITIES
from pipeline.modality.bundle import chosen, register
from pipeline.modality.losses import causal_loss, classification_loss, cross_entropy_sum

CLASSIFICATION, GENERATION = MODALITIES["text-classification"], MODALITIES["text-generation"]


def make_tokenizer(**special):
    words = ["<pad>", "<eos>", "<unk>", *"a b c d e f g h i j k l m".split()]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    special = special or {"pad_token": "<pad>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", **special)


def make_config(task="text-classification", max_length=6):
    return RunConfig(
        name="t",
        model={"task": task, "model_type": "llama"},
        data={"path": "json", "max_length": max_length},
    )


def prepare(task, texts, max_samples=None, labels=None, **options):
    config = make_config(task, **options)
    rows = Dataset.from_dict({"text": texts} | ({"label": labels} if labels else {}))
    names = ("no", "yes") if labels else None
    modality = MODALITIES[task]
    return modality.prepare(
        rows, config.data, config, make_tokenizer(), names, max_samples=max_samples
    )


def batch_of(rows, task="text-generation", tokenizer=None, **options):
    collate = MODALITIES[task].collator(tokenizer or make_tokenizer(), make_config(task, **options))
    return collate(list(rows))


def random_batch(num_rows=16, width=9, num_classes=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, width, num_classes, generator=generator) * 3
    labels = torch.randint(0, num_classes, (num_rows, width), generator=generator)
    lengths = torch.randint(2, width + 1, (num_rows, 1), generator=generator)
    labels[torch.arange(width) >= lengths] = -100
    labels[:, 0] = -100
    return logits.requires_grad_(), labels


def test_a_task_registered_twice_is_refused():
    with pytest.raises(ValueError, match="text-generation.*twice"):
        register(GENERATION)


def test_classification_keeps_text_and_numbers_rows_and_labels_by_name():
    rows = prepare("text-classification", ["a b", "c", "a"], labels=["yes", "no", "yes"])
    assert list(rows["labels"]) == [1, 0, 1]
    assert list(rows["sample_id"]) == [0, 1, 2]
    assert list(rows["text"]) == ["a b", "c", "a"]


def test_classification_cuts_at_max_length():
    rows = prepare("text-classification", ["a b c d"], max_length=3)
    assert rows[0]["input_ids"] == [3, 4, 5]


def test_a_limit_keeps_the_ids_that_rows_have_without_it():
    texts = [f"{word} a" for word in "abcdefghijklm"]
    whole = {row["sample_id"]: row["text"] for row in prepare("text-classification", texts)}
    part = prepare("text-classification", texts, max_samples=5)
    assert len(part) == 5
    assert list(part["sample_id"]) == chosen(13, 5)
    assert all(whole[row["sample_id"]] == row["text"] for row in part)


def test_blocks_join_documents_by_the_end_token_and_keep_the_last_part():
    rows = prepare("text-generation", ["a b c", "", "d e", "f g h"], max_length=4)
    assert list(rows["input_ids"]) == [[3, 4, 5, 1], [6, 7, 1, 8], [9, 10, 1]]
    assert list(rows["sample_id"]) == [0, 1, 2]
    assert rows[1]["text"] == "d e <eos> f"


def test_a_last_block_of_one_token_is_left_out():
    rows = prepare("text-generation", ["a b c d"], max_length=4)
    assert list(rows["input_ids"]) == [[3, 4, 5, 6]]


def test_a_limit_chooses_whole_blocks_by_key():
    rows = prepare("text-generation", ["a b c"] * 20, max_samples=3, max_length=4)
    assert list(rows["sample_id"]) == chosen(20, 3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_collator_pads_on_the_side_of_the_tokenizer(side):
    tokenizer = make_tokenizer()
    tokenizer.padding_side = side
    rows = [{"input_ids": [3, 4, 5], "sample_id": 7}, {"input_ids": [6, 7], "sample_id": 9}]
    batch = batch_of(rows, tokenizer=tokenizer)
    assert batch["input_ids"].shape == (2, 6)  # 8 would be beyond max_length
    real = batch["attention_mask"].bool()
    assert real[:, 0].all() == (side == "right")
    assert batch["input_ids"][real].tolist() == [3, 4, 5, 6, 7]
    assert batch["labels"][real].tolist() == [-100, 4, 5, -100, 7]
    assert (batch["labels"][~real] == -100).all()
    assert batch["sample_id"].tolist() == [7, 9]


def test_the_collator_keeps_the_step_and_drops_the_text():
    rows = prepare("text-classification", ["a b", "c"], labels=["no", "yes"])
    batch = batch_of([{**row, "mask_step": 3} for row in rows], "text-classification")
    assert batch["mask_step"].tolist() == [3, 3]
    assert batch["labels"].tolist() == [0, 1]
    assert "text" not in batch
    assert all(values.dtype == torch.int64 for values in batch.values())


def test_an_out_of_distribution_batch_has_no_labels():
    rows = prepare("text-classification", ["a b", "c"])
    assert "labels" not in batch_of(rows, "text-classification")


def test_a_tokenizer_without_padding_token_pads_with_its_end_token_and_says_so():
    tokenizer = make_tokenizer(eos_token="<eos>")
    assert "end token '<eos>' pads" in GENERATION.notes(tokenizer)[0]
    batch = batch_of([{"input_ids": [3, 4, 5]}, {"input_ids": [6]}], tokenizer=tokenizer)
    assert batch["input_ids"][1].tolist() == [6, 1, 1, 1, 1, 1]
    assert batch["attention_mask"][1].tolist() == [1, 0, 0, 0, 0, 0]


def test_documents_joined_without_an_end_token_are_said():
    assert "no end token" in GENERATION.notes(make_tokenizer(pad_token="<pad>"))[0]


def test_a_tokenizer_without_padding_and_end_token_is_an_error():
    with pytest.raises(ModelError, match="neither a padding nor an end token"):
        GENERATION.collator(make_tokenizer(cls_token="a"), make_config())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [2**24, 25])
def test_the_loss_and_its_gradient_equal_torch(smoothing, chunk, monkeypatch):
    monkeypatch.setattr("pipeline.modality.losses.CHUNK_ELEMENTS", chunk)
    logits, labels = random_batch()
    ours = causal_loss(smoothing)({"logits": logits}, labels, None)
    (gradient,) = torch.autograd.grad(ours, logits)
    theirs = cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=smoothing
    )
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs, logits)[0])


def test_the_gradient_is_right_by_finite_differences():
    logits, labels = random_batch(2, 3, 4)
    rows = logits.detach().double().flatten(0, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cross_entropy_sum(x, labels.flatten(), 0.2), rows)


def test_half_precision_logits_are_judged_in_float32():
    logits, labels = random_batch()
    half = logits.detach().bfloat16().requires_grad_()
    ours = causal_loss(0.0)({"logits": half}, labels, None)
    ours.backward()
    assert ours.dtype == torch.float32
    assert half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(ours, causal_loss(0.0)({"logits": half.float()}, labels, None))


def test_a_batch_without_valid_labels_gives_zero_and_a_graph():
    logits = torch.randn(3, 4, requires_grad=True)
    loss = classification_loss(0.1)({"logits": logits}, torch.full((3,), -100), None)
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sixteen_rows_equal_four_times_four(smoothing):
    logits, labels = random_batch()
    loss, num_items = causal_loss(smoothing), (labels != -100).sum()
    whole = loss({"logits": logits}, labels, num_items)
    parts = sum(
        loss({"logits": part}, target, num_items)
        for part, target in zip(logits.split(4), labels.split(4), strict=True)
    )
    torch.testing.assert_close(whole, parts)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (whole, parts)]
    torch.testing.assert_close(*gradients)


def test_labels_count_the_predicted_tokens_however_the_trainer_counts():
    rows = [{"input_ids": [3, 4, 5, 6]}, {"input_ids": [6, 7]}]
    for side in ("left", "right"):
        tokenizer = make_tokenizer()
        tokenizer.padding_side = side
        labels = batch_of(rows, tokenizer=tokenizer)["labels"]
        assert labels.ne(-100).sum() == labels[:, 1:].ne(-100).sum() == 3 + 1


def test_sums_add_over_batches_to_the_metrics_of_the_whole_set():
    logits, labels = torch.randn(50, 4) * 2, torch.randint(0, 4, (50,))
    parts = [
        CLASSIFICATION.eval_sums(*part)
        for part in zip(logits.split(7), labels.split(7), strict=True)
    ]
    metrics = CLASSIFICATION.eval_metrics({k: sum(p[k] for p in parts) for k in parts[0]})
    assert metrics["loss"] == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert metrics["ece"] == pytest.approx(plain_ece(logits, labels), rel=1e-5)
    assert set(metrics) == set(CLASSIFICATION.metric_names)


def plain_ece(logits, labels, num_bins=15):
    confidence, prediction = logits.softmax(1).max(1)
    correct, error = (prediction == labels).float(), 0.0
    for b in range(num_bins):
        inside = (confidence > b / num_bins) & (confidence <= (b + 1) / num_bins)
        if inside.any():
            gap = (correct[inside].mean() - confidence[inside].mean()).abs()
            error += gap.item() * inside.sum().item() / len(labels)
    return error


def test_perplexity_is_that_of_all_predicted_tokens():
    logits, labels = random_batch()
    sums = GENERATION.eval_sums(logits.detach(), labels)
    metrics = GENERATION.eval_metrics(sums)
    mean = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert metrics["perplexity"] == pytest.approx(mean.exp().item(), rel=1e-5)
    assert set(metrics) == set(GENERATION.metric_names)
