"""Packed documents against the same documents one at a time: masks, loss and gradients."""

import json

import pytest
import torch
from torch import nn

from pipeline.callbacks import Meter
from pipeline.config.load import load_config
from pipeline.config.schema import RunConfig
from pipeline.data import load_raw
from pipeline.dropout.context import KeyedDropout
from pipeline.errors import DataError, DropoutError, ModelError
from pipeline.modality.language import _collate
from pipeline.model import build_model, plan_for
from pipeline.packing import documents_of, pack, packed, require_isolation
from pipeline.records import RunFolder, read_jsonl
from pipeline.train import train
from pipeline.verify.worker import padded

LLAMA = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 60}
LLAMA |= {"intermediate_size": 24, "max_position_embeddings": 32, "initializer_range": 0.2}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 60, "n_positions": 32}
INSERTED = {"insert": {"embedding": 0.2, "hidden": 0.3}}
OWN = {"embedding": 0.2, "hidden": 0.1, "attention": 0.3}
ATTENDING = INSERTED | {"attention": 0.3}
LENGTHS = (5, 9, 2, 7, 16, 3, 4)


def built(kind, shape, dropout, attention="eager", **extra):
    model = {"task": "text-generation", "model_type": kind, "config_overrides": shape}
    config = RunConfig.model_validate(
        {
            "name": "tiny",
            "model": model | {"attn_implementation": attention},
            "data": {"path": "json", "max_length": 16},
            "dropout": dropout,
            "train": {"extra": extra},
        }
    )
    plan = plan_for(config, None)
    return build_model(config, None, plan), plan


def documents():
    from datasets import Dataset

    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(60, (n,), generator=generator).tolist() for n in LENGTHS]
    return Dataset.from_dict({"input_ids": ids, "sample_id": [100 + n for n in range(len(ids))]})


def collated(rows, left=False):
    values = {"input_ids": 0, "attention_mask": 0}
    return _collate(rows, padding=values, left=left, longest=16, causal=True)


def loss_and_gradients(model, keyed, batches):
    model.zero_grad()
    total = 0.0
    for batch in batches:
        ids, labels = batch.pop("sample_id"), batch.pop("labels")
        with keyed.context(purpose="train", index=3, row_ids=ids):
            logits = model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1)
            loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
            loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}


def test_every_document_is_packed_once_and_whole():
    rows = pack(LENGTHS, 16)
    assert sorted(number for row in rows for number in row) == list(range(len(LENGTHS)))
    assert all(sum(LENGTHS[number] for number in row) <= 16 for row in rows)
    assert len(rows) == 3  # 46 tokens: not one row more than needed
    assert rows == sorted(rows)
    found = [document for row in packed(documents(), 16) for document in documents_of(row)]
    assert sorted(found, key=lambda d: d["sample_id"]) == list(documents())


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(
    "made",
    [
        ("llama", LLAMA, INSERTED, "sdpa"),
        ("llama", LLAMA, INSERTED, "eager"),
        ("llama", LLAMA, ATTENDING, "keyed"),
        ("gpt2", GPT2, OWN, "eager"),
        ("gpt2", GPT2, OWN, "keyed"),
    ],
    ids=lambda made: f"{made[0]}-{made[-1]}",
)
def test_packed_equals_unpacked(made, left):
    model, plan = built(*made)
    require_isolation(model, plan)
    keyed, rows = KeyedDropout(model.train(), plan, 7), packed(documents(), 16)
    each = [collated([document]) for document in documents()]
    loss, gradients = loss_and_gradients(model, keyed, [collated(list(rows), left)])
    expected_loss, expected = loss_and_gradients(model, keyed, each)
    keyed.release()
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, gradient in gradients.items():
        scale = expected[name].abs().max()
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-5 * scale, msg=name)


def test_more_padding_behind_packed_rows_changes_nothing():
    model, plan = built("llama", LLAMA, INSERTED)
    keyed, rows = KeyedDropout(model.train(), plan, 7), list(packed(documents(), 16))
    loss, gradients = loss_and_gradients(model, keyed, [padded(collated, 8, 24)(rows)])
    expected_loss, expected = loss_and_gradients(model, keyed, [collated(rows)])
    keyed.release()
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, gradient in gradients.items():
        scale = expected[name].abs().max()
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-5 * scale, msg=name)


def test_padding_of_packed_rows_is_not_counted_as_tokens():
    meter, batch = Meter(), collated(list(packed(documents(), 16)))
    meter.count_tokens(batch, batch.pop("sample_id"))
    assert int(meter.num_tokens) == sum(LENGTHS) < batch["input_ids"].numel()


def test_models_that_mix_documents_are_refused_by_name():
    for kind, shape, fault in (
        ("bloom", {"hidden_size": 16, "n_layer": 1, "n_head": 2, "vocab_size": 60}, "see other"),
        ("mamba", {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 60}, "see other"),
    ):
        model, plan = built(kind, shape, {}, None)
        with pytest.raises(ModelError, match=rf"but {kind} .*") as caught:
            require_isolation(model, plan)
        assert fault in str(caught.value)


def test_dropout_by_whole_samples_is_refused():
    model, plan = built("llama", LLAMA, INSERTED, neftune_noise_alpha=5.0)
    with pytest.raises(DropoutError, match="noise by the sample's length"):
        require_isolation(model, plan)


CONFIG = """
name: packed
output_dir: runs
model: {task: text-generation, model_type: llama, tokenizer_vocab_size: 300,
        config_overrides: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2,
                           intermediate_size: 16, max_position_embeddings: 32}}
data: {path: json, data_files: rows.jsonl, validation_split: "train[:4]", test_split: "train[:4]",
       max_length: 32, packing: true}
train: {global_batch_size: 2, per_device_train_batch_size: 1, max_steps: 2, logging_steps: 1,
        use_cpu: true}
dropout: {insert: {hidden: 0.1}}
wandb: {mode: disabled}
"""


def test_a_run_trains_on_packed_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIG)
    rows = [json.dumps({"text": "a word of many " * (1 + n % 3)}) for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    config = load_config("run.yaml")
    assert train(config) == 0
    losses = [row for row in read_jsonl(RunFolder("runs/packed").metrics) if "train/loss" in row]
    assert len(losses) == 2


def test_only_text_generation_packs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIG.replace("text-generation", "text-classification"))
    (tmp_path / "rows.jsonl").write_text('{"text": "a word", "label": "a"}\n' * 8)
    with pytest.raises(DataError, match=r"data\.packing: packs documents of text-generation"):
        load_raw(load_config("run.yaml"))
