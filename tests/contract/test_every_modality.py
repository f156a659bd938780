"""The one contract: every registered modality keeps it, from raw rows to the report.

Examples, batch, loss, masks locked to the sample, gradients of 16 and of 4 x 4, the same model from
the disk, passes that differ by dropout alone, out-of-distribution scores, profile, report.
"""

import io
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from datasets import Audio, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Picture
from safetensors.torch import load_file
from torch import Tensor, nn

from monitoring.profile import save_profile
from monitoring.report import write_report
from pipeline.config.load import ROOT
from pipeline.config.schema import RunConfig
from pipeline.data import load_raw, prepare_data, training_stream
from pipeline.dropout.audit import audited
from pipeline.dropout.context import KeyedDropout
from pipeline.evaluation.mc_dropout import MonteCarlo
from pipeline.evaluation.stage import evaluate
from pipeline.modality.bundle import MODALITIES, modality_of
from pipeline.model import build_model, plan_for
from pipeline.records import RunFolder
from pipeline.train import train
from pipeline.trained import trained_label_names, trained_model, trained_processor

SIZES = {"train": 40, "validation": 12, "test": 12, "ood": 8}
FILE = {"bytes": Value("binary"), "path": Value("string")}
BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 24, "max_position_embeddings": 64}  # fmt: skip
LLAMA = {**BERT, "max_position_embeddings": 128, "initializer_range": 0.2}
VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
       "intermediate_size": 24, "image_size": 8, "patch_size": 4, "num_channels": 1}  # fmt: skip
WAV2VEC2 = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "conv_dim": [8, 8], "conv_kernel": [20, 8], "conv_stride": [10, 8],
    "num_feat_extract_layers": 2, "feat_extract_norm": "layer", "do_stable_layer_norm": True,
    "num_conv_pos_embeddings": 5, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8,
}  # fmt: skip


# -- one case a bundle: its sections of the configuration, and its rows --------------------------


def worded(number: int, split: str) -> str:
    sort = ("a big dog", "some red paint", "one sad song")[number % 3]
    return f"{split} {number} about {sort} " + "and so on " * (number % 4)


def save(folder: Path, row_of: Callable[[int, str], dict[str, Any]], **casts: Any) -> None:
    splits = {}
    for split, size in SIZES.items():
        rows = Dataset.from_list([row_of(n, split) for n in range(size)])
        for column, kind in casts.items():
            features = Features({**rows.features, column: FILE})
            rows = rows.cast(features).cast_column(column, kind)
        splits[split] = rows
    DatasetDict(splits).save_to_disk(folder / "rows")


def text_classification(folder: Path) -> dict[str, Any]:
    save(folder, lambda n, split: {"text": worded(n, split), "label": "abc"[n % 3]})
    model = {"model_type": "bert", "config_overrides": BERT, "tokenizer_vocab_size": 300}
    dropout = {"embedding": 0.1, "hidden": 0.2, "attention": 0.2}
    return {"model": model, "data": {"max_length": 48}, "dropout": dropout}


def text_generation(folder: Path) -> dict[str, Any]:
    save(folder, lambda n, split: {"text": f"{worded(n, split)} {worded(n + 1, split)} the end"})
    model = {"model_type": "llama", "config_overrides": LLAMA, "tokenizer_vocab_size": 280}
    dropout = {"insert": {"embedding": 0.2, "hidden": 0.2}}
    return {"model": model, "data": {"max_length": 32}, "dropout": dropout}


def conversations(folder: Path) -> dict[str, Any]:
    def row(number: int, split: str) -> dict[str, Any]:
        asked = {"role": "user", "content": worded(number, split)}
        answered = {"role": "assistant", "content": ("yes", "no it is not")[number % 2]}
        return {"messages": [asked, answered]}

    save(folder, row)
    template = str(ROOT / "configs/language/chatml.jinja")
    data = {"messages_column_name": "messages", "chat_template": template, "max_length": 96}
    model = {"model_type": "llama", "config_overrides": LLAMA, "tokenizer_vocab_size": 300}
    dropout = {"insert": {"embedding": 0.2, "hidden": 0.2}}
    return {"model": {"task": "text-generation", **model}, "data": data, "dropout": dropout}


def image_classification(folder: Path) -> dict[str, Any]:
    def row(number: int, split: str) -> dict[str, Any]:
        pixels = np.random.default_rng(number).integers(0, 80, (8, 8)) + 80 * (number % 3)
        file = io.BytesIO()
        Picture.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
        image = {"bytes": file.getvalue(), "path": f"{split}-{number}.png"}
        return {"image": image, "label": "abc"[number % 3]}

    save(folder, row, image=Image(decode=False))
    dropout = {"hidden": 0.2, "attention": 0.2, "insert": {"patch": 0.2, "head": 0.2}}
    data = {"augmentation": {"image": {"shift_pixels": 1}}}
    return {
        "model": {"model_type": "vit", "config_overrides": VIT},
        "data": data,
        "dropout": dropout,
    }


def audio_classification(folder: Path) -> dict[str, Any]:
    def row(number: int, split: str) -> dict[str, Any]:
        time = np.arange(1200 + 160 * (number % 5)) / 8000
        file = io.BytesIO()
        tone = 0.5 * np.sin(2 * np.pi * 300 * (1 + number % 3) * time + number)
        soundfile.write(file, tone, 8000, format="WAV", subtype="PCM_16")
        audio = {"bytes": file.getvalue(), "path": f"{split}-{number}.wav"}
        return {"audio": audio, "label": "abc"[number % 3]}

    save(folder, row, audio=Audio(sampling_rate=8000, decode=False))
    model = {"model_type": "wav2vec2", "config_overrides": WAV2VEC2, "sampling_rate": 8000}
    data = {"augmentation": {"audio": {"gain_db": 6}}}
    dropout = {"feature": 0.1, "hidden": 0.2, "attention": 0.2, "activation": 0.1}
    return {"model": model, "data": data, "dropout": dropout}


def multimodal_classification(folder: Path) -> dict[str, Any]:
    def row(number: int, split: str) -> dict[str, Any]:
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8))
        file = io.BytesIO()
        Picture.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
        photo = {"bytes": file.getvalue(), "path": None}
        return {"photo": photo, "caption": worded(number, split), "label": "abc"[number % 3]}

    save(folder, row, photo=Image(decode=False))
    text = {"model_type": "bert", "config_overrides": BERT, "tokenizer_vocab_size": 300}
    channels = {
        "text": {"modality": "text", **text},
        "photo": {"modality": "image", "model_type": "vit", "config_overrides": VIT},
    }
    dropout = {"modality": {"text": 0.3, "photo": 0.3}, "hidden": 0.2, "attention": 0.2}
    data = {"max_length": 48, "channel_column_names": {"text": "caption"}}
    return {"model": {"channels": channels}, "data": data, "dropout": dropout}


def image_text_to_text(folder: Path) -> dict[str, Any]:
    def row(number: int, split: str) -> dict[str, Any]:
        name, colour = (("red", (220, 20, 20)), ("blue", (20, 20, 220)))[number % 2]
        file = io.BytesIO()
        Picture.new("RGB", (16 + number % 3, 20), colour).save(file, "PNG")
        asked = [{"type": "image", "text": None}, {"type": "text", "text": "which colour"}]
        answer = [{"type": "text", "text": f"it is {name}" + " indeed" * (number % 3)}]
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        return {"image": {"bytes": file.getvalue(), "path": None}, "messages": messages}

    save(folder, row, image=Image(decode=False))
    dropout = {"attention": 0.1, "insert": {"embedding": 0.2, "hidden": 0.2}}
    data = {"messages_column_name": "messages", "max_length": 96}
    return {
        "model": {"model_name_or_path": str(folder / "llava")},
        "data": data,
        "dropout": dropout,
    }


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "text-classification": text_classification,
    "text-generation": text_generation,
    "conversations": conversations,
    "image-classification": image_classification,
    "audio-classification": audio_classification,
    "multimodal-classification": multimodal_classification,
    "image-text-to-text": image_text_to_text,
}


def config_of(task: str, folder: Path) -> RunConfig:
    given = CASES[task](folder)
    rows = str(folder / "rows")
    columns = {name: column for name, column in given["data"].items() if name.endswith("_name")}
    ood = {"other": {"path": rows, "split": "ood", **columns}}
    steps = {"global_batch_size": 16, "per_device_train_batch_size": 8, "max_steps": 3}
    return RunConfig.model_validate(
        {
            "name": "run",
            "output_dir": str(folder),
            "model": {"task": task} | given["model"],
            "data": {"path": rows, "ood": ood} | given["data"],
            "dropout": given["dropout"],
            "train": steps | {"use_cpu": True, "learning_rate": 1e-2, "adam_epsilon": 1e-3},
            "evaluation": {"num_mc_passes": 3, "knn_neighbours": 2, "num_bootstrap_resamples": 20},
            "wandb": {"mode": "disabled"},
        }
    )


def test_every_modality_has_a_case():
    assert CASES.keys() == MODALITIES.keys()


# -- one step ------------------------------------------------------------------------------------


@dataclass
class Opened:
    """Rows of the first global batch and a model with its doors open, as training has them."""

    config: RunConfig
    rows: list[dict[str, Any]]
    model: nn.Module
    keyed: KeyedDropout
    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]]
    loss: Callable[..., Tensor]

    def losses(
        self, parts: list[list[int]], *, step: int | None = 0, backward: bool = False
    ) -> Tensor:
        """The loss of each of these micro-batches, over the items of all; no step: no masks."""
        batches = [self.collate([self.rows[place] for place in part]) for part in parts]
        items, found = sum(int((b["labels"] != -100).sum()) for b in batches), []
        for batch in batches:
            ids, labels = batch.pop("sample_id"), batch.pop("labels")
            batch.pop("mask_step", None)
            if step is None:
                found.append(self.loss(self.model(**batch), labels, items))
                continue
            with self.keyed.context(purpose="train", index=step, row_ids=ids):
                found.append(self.loss(self.model(**batch), labels, items))
                if backward:
                    found[-1].backward()
        return torch.stack(found).detach()

    def gradients(self, parts: list[list[int]]) -> dict[str, Tensor]:
        self.model.zero_grad()
        self.losses(parts, backward=True)
        return {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module", params=CASES)
def config(request, tmp_path_factory, llava) -> RunConfig:
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "llava").symlink_to(llava)
    return config_of(request.param, folder)


@pytest.fixture(scope="module")
def opened(config) -> Opened:
    modality, raw = modality_of(config), load_raw(config)
    processor = modality.load_processor(config, raw.train)
    data = prepare_data(config, raw, processor)
    stream = training_stream(config, data.train, 2)
    plan = plan_for(config, data.label_names, processor)
    model = build_model(config, data.label_names, plan, processor)
    with torch.no_grad():  # initial weights are so small that no mask would show
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    keyed = KeyedDropout(model.train(), plan, config.seed)
    collate = modality.collator(processor, config)
    return Opened(config, [stream[k] for k in range(16)], model, keyed, collate, modality.loss(0.0))


WHOLE = [list(range(16))]
FOURS = [list(range(start, start + 4)) for start in range(0, 16, 4)]
ALONE_BACKWARDS = [[place] for place in reversed(range(16))]


def test_the_loss_of_a_batch_is_that_of_its_samples_one_by_one(opened):
    opened.model.eval()
    with torch.no_grad():
        whole, alone = (opened.losses(p, step=None).sum() for p in (WHOLE, ALONE_BACKWARDS))
    opened.model.train()
    assert torch.isfinite(whole)
    torch.testing.assert_close(alone, whole, rtol=1e-5, atol=0)


def test_masks_are_locked_to_the_sample(opened):
    """Alone, in another order, in another micro-batch: a sample's loss under masks is the same."""
    with torch.no_grad():
        alone = opened.losses(ALONE_BACKWARDS)
        whole, fours = opened.losses(WHOLE).sum(), opened.losses(FOURS)
        other = opened.losses(WHOLE, step=1).sum()
    torch.testing.assert_close(alone.sum(), whole, rtol=1e-5, atol=0)
    torch.testing.assert_close(alone.flip(0).view(4, 4).sum(1), fours, rtol=1e-5, atol=0)
    assert abs(other - whole) > 1e-4 * whole


def test_gradients_of_sixteen_are_those_of_four_times_four_and_nothing_leaks(opened):
    with audited(opened.model) as leaks:
        whole = opened.gradients(WHOLE)
    fours = opened.gradients(FOURS)
    assert leaks == []
    assert whole.keys() == fours.keys()
    largest = max(gradient.abs().max() for gradient in whole.values())
    for name, gradient in whole.items():
        scale = max(gradient.abs().max(), 1e-3 * largest)  # a bias may hold rounding alone
        torch.testing.assert_close(fours[name], gradient, rtol=0, atol=1e-5 * scale, msg=name)


def test_passes_differ_by_dropout_alone(opened):
    opened.model.eval()
    batch = opened.collate(opened.rows)
    ids = batch.pop("sample_id")
    inputs = {n: v for n, v in batch.items() if n not in ("labels", "mask_step")}
    passes = MonteCarlo(opened.keyed, 3)
    with torch.no_grad():
        first, again = (torch.stack(list(passes.passes(inputs, ids))) for _ in range(2))
        plain = [opened.model(**inputs).logits for _ in range(2)]
    opened.model.train()
    assert torch.equal(first, again)
    assert torch.equal(*plain)
    assert (first.var(dim=0).flatten(1).amax(1) > 0).all()


# -- a run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(config) -> tuple[RunFolder, dict[str, Any]]:
    assert train(config) == 0
    found = RunFolder(Path(config.output_dir) / config.name)
    return found, evaluate(found, config, keep_profile=save_profile)


def test_a_run_goes_from_rows_to_scores_profile_and_report(run):
    folder, report = run
    assert np.isfinite(list(report["quality"]["mc"].values())).all()
    areas = [one["auroc"] for one in report["ood"]["other"]["scores"].values()]
    assert len(areas) > 5
    assert all(0 <= area <= 1 for area in areas)
    assert report["uncertainty"]["means"]["mutual_information"] > 0
    assert any(folder.profile.iterdir())
    assert write_report(folder).read_text().lstrip().startswith("<!doctype html>")


def test_a_run_that_goes_on_ends_where_one_that_never_stopped_did(config):
    train_config = config.train.model_copy(update={"save_steps": 2})
    again = config.model_copy(update={"name": "going-on", "train": train_config})
    folder = RunFolder(Path(config.output_dir) / "going-on")
    assert train(again) == 0
    expected = load_file(folder.model / "model.safetensors")
    shutil.rmtree(folder.model)
    shutil.rmtree(folder.checkpoint(3))
    assert train(again) == 0
    for name, weight in load_file(folder.model / "model.safetensors").items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6, msg=name)


def test_the_saved_model_answers_as_before(run, config):
    folder, _ = run
    processor, names = trained_processor(folder, config), trained_label_names(folder)
    rows = prepare_data(config, load_raw(config), processor).test
    plan = plan_for(config, names, processor)
    batch = modality_of(config).collator(processor, config)(list(rows)[:8])
    inputs = {n: v for n, v in batch.items() if n not in ("labels", "sample_id")}
    with torch.no_grad():
        first, again = (
            trained_model(folder, config, plan, processor).eval()(**inputs).logits for _ in range(2)
        )
    assert torch.equal(first, again)
    assert torch.isfinite(first).all()
