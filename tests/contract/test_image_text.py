"""image-text-to-text: an image's tokens in place, sites by hand, odd rows, the shipped file."""

import io
from typing import Any

import pytest
import torch
from datasets import Dataset, Image
from PIL import Image as Picture

from pipeline.check import check, plan
from pipeline.config.load import ROOT, load_config
from pipeline.data import load_raw, prepare_data
from pipeline.errors import DataError, MasklockError, ModelError
from pipeline.modality.bundle import modality_of
from pipeline.model_config import model_config

SIZE = {"train": 12, "validation": 4, "test": 4}
FILE = ROOT / "configs/multimodal/llava.yaml"


def png(width: int = 16, height: int = 20) -> dict[str, Any]:
    file = io.BytesIO()
    Picture.new("RGB", (width, height), (220, 20, 20)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def talk(*asked: str, answer: str = "it is red") -> list[dict[str, Any]]:
    """A user's parts, `<image>` for the image, and what the assistant says."""
    parts = [
        {"type": "image", "text": None} if one == "<image>" else {"type": "text", "text": one}
        for one in asked
    ]
    said = [{"type": "text", "text": answer}]
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": said}]


@pytest.fixture
def run_of(llava, tmp_path):
    """The shipped configuration with the small model, on these training rows."""

    def make(rows: list[dict[str, Any]], *more: str):
        good = {"image": png(), "messages": talk("<image>", "which colour")}
        for split, size in SIZE.items():
            every = [*rows, *[good] * (size - len(rows))] if split == "train" else [good] * size
            made = Dataset.from_list(every).cast_column("image", Image(decode=False))
            made.to_parquet(tmp_path / f"{split}.parquet")
        files = [f"data.data_files.{split}={tmp_path}/{split}.parquet" for split in SIZE]
        small = ["train.global_batch_size=4", "train.per_device_train_batch_size=4"]
        small += ["train.bf16=false", "model.dtype=float32", "data.max_length=96"]
        name = [f"model.model_name_or_path={llava}", f"output_dir={tmp_path}"]
        return load_config(FILE, [*files, *small, *name, *more])

    return make


def prepared(config):
    modality, raw = modality_of(config), load_raw(config)
    processor = modality.load_processor(config, raw.train)
    return prepare_data(config, raw, processor), processor


def test_check_accepts_the_shipped_file_and_its_rates_are_in_force(run_of):
    config = run_of([])
    assert check(config)[-1] == "No errors."
    found = {(site.role, site.rate) for site in plan(config).in_force()}
    assert found == {("adapter", 0.05), ("hidden", 0.05)}


def test_the_plan_is_the_hand_made_list(run_of):
    rates = ["dropout.adapter=null", "peft=null", "dropout.attention=0.1"]
    live = plan(run_of([], *rates, "dropout.insert.embedding=0.2")).in_force()
    found = sorted((site.site, site.role, site.rate) for site in live)
    text, sees = "model.language_model", "model.vision_tower"
    stacks = (f"{text}.layers", f"{sees}.encoder.layers")
    blocks = [f"{s}.{n}.{part}" for s in stacks for n in (0, 1) for part in ("mlp", "self_attn")]
    assert found == sorted(
        [
            *((block, "hidden", 0.05) for block in blocks),
            (f"{text}.embed_tokens", "embedding", 0.2),
            *((f"{text}.layers.{layer}.self_attn", "attention", 0.1) for layer in (0, 1)),
            *((f"{sees}.encoder.layers.{layer}.self_attn", "attention", 0.1) for layer in (0, 1)),
        ]
    )


def test_an_image_is_its_tokens_in_its_place_and_only_answers_are_learned(run_of):
    data, processor = prepared(run_of([{"image": png(), "messages": talk("see", "<image>", "?")}]))
    row = data.train[0]
    assert row["input_ids"].count(processor.image_token_id) == 16
    learned = [t for t, m in zip(row["input_ids"], row["label_mask"], strict=True) if m]
    assert processor.tokenizer.decode(learned) == "it is red<end>"
    before = row["input_ids"][: row["input_ids"].index(processor.image_token_id)]
    assert processor.tokenizer.decode(before).endswith("<user>see")


def test_a_batch_holds_the_pixels_of_the_processor(run_of):
    config = run_of([])
    data, processor = prepared(config)
    batch = modality_of(config).collator(processor, config)([data.test[0]])
    picture = Picture.open(io.BytesIO(png()["bytes"]))
    expected = processor.image_processor([picture], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"], expected)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": png(), "messages": talk("<image>", "<image>")}, "2 places for images"),
        ({"image": {"bytes": b"no image", "path": None}, "messages": talk("<image>")}, "image"),
        ({"image": png(), "messages": talk("very " * 60, "<image>")}, "beyond the 96"),
        ({"image": png(), "messages": talk("<image>", "very " * 60)}, "assistant"),
    ],
)
def test_a_row_that_cannot_be_used_is_set_aside_with_its_reason(run_of, row, reason):
    data, _ = prepared(run_of([row], "data.quarantine_budget=0.2"))
    (lost,) = data.set_aside
    assert (lost.sample_id, lost.split) == (0, "train")
    assert reason in lost.reason
    with pytest.raises(DataError, match="1 of 12 samples cannot be used"):
        prepared(run_of([row]))


def test_rows_without_conversations_and_models_without_processor_are_refused(run_of):
    with pytest.raises(MasklockError, match="image-text-to-text needs data.messages_column_name"):
        run_of([], "data.messages_column_name=null")
    scratch = ["model.model_name_or_path=null", "model.model_type=llava", "peft=null"]
    with pytest.raises(ModelError, match="needs a processor that knows the model's image token"):
        prepared(run_of([], *scratch, "dropout.adapter=null"))


def test_a_processor_of_another_model_is_named(run_of):
    config = run_of([])
    _, processor = prepared(config)
    processor.num_additional_image_tokens = 0
    hf_config = model_config(config, None)
    with pytest.raises(ModelError, match="writes 15 tokens an image, the model makes 16 features"):
        modality_of(config).fit(hf_config, processor, config)
