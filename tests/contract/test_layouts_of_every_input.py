"""verify-sync of conversations, mixed images and sounds: no layout changes a mask or an input.

Inputs are varied by key, so that losses and gradients show an augmentation or a partner that
depends on the layout. The plain loop weighs the two labels of a mixed image by hand.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from datasets import Audio, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Picture

from pipeline.config.load import ROOT
from pipeline.config.schema import RunConfig
from pipeline.data import TrainingStream
from pipeline.verify import stage, worker
from pipeline.verify.compare import compare
from pipeline.verify.layouts import parse_layouts

FILE = {"bytes": Value("binary"), "path": Value("string")}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 24}
VIT = SMALL | {"image_size": 8, "patch_size": 4, "num_channels": 1}
WAVES = {"conv_dim": [8, 8], "conv_kernel": [20, 8], "conv_stride": [10, 8]}
WAVES |= {"num_feat_extract_layers": 2, "feat_extract_norm": "layer", "do_stable_layer_norm": True}
WAVES |= {"num_conv_pos_embeddings": 5, "num_conv_pos_embedding_groups": 2}
WAVES |= SMALL | {"classifier_proj_size": 8}


def picture(number: int) -> dict[str, Any]:
    pixels, file = np.random.default_rng(number).integers(0, 255, (8, 8)), io.BytesIO()
    Picture.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return {
        "image": {"bytes": file.getvalue(), "path": f"{number}.png"},
        "label": "abc"[number % 3],
    }


def clip(number: int) -> dict[str, Any]:
    time, file = np.arange(1200 + 160 * (number % 5)) / 8000, io.BytesIO()
    tone = 0.5 * np.sin(2 * np.pi * 300 * (1 + number % 3) * time + number)
    soundfile.write(file, tone, 8000, format="WAV", subtype="PCM_16")
    return {
        "audio": {"bytes": file.getvalue(), "path": f"{number}.wav"},
        "label": "abc"[number % 3],
    }


def talk(number: int) -> dict[str, Any]:
    asked = {"role": "user", "content": f"number {number} or " + "more " * (number % 4)}
    return {
        "messages": [asked, {"role": "assistant", "content": ("yes", "no not at all")[number % 2]}]
    }


def images() -> dict[str, Any]:
    varied = {"shift_pixels": 1, "mixup_alpha": 0.4, "cutmix_alpha": 1.0}
    model = {"task": "image-classification", "model_type": "vit", "config_overrides": VIT}
    dropout = {"hidden": 0.2, "attention": 0.2, "insert": {"patch": 0.2, "head": 0.2}}
    return {"model": model, "data": {"augmentation": {"image": varied}}, "dropout": dropout}


def sounds() -> dict[str, Any]:
    varied = {"gain_db": 6, "speed": 0.1, "noise_snr_db": [5, 20]}
    model = {"task": "audio-classification", "model_type": "wav2vec2", "config_overrides": WAVES}
    dropout = {"feature": 0.1, "hidden": 0.2, "attention": 0.2, "activation": 0.1}
    data = {"augmentation": {"audio": varied}}
    return {"model": model | {"sampling_rate": 8000}, "data": data, "dropout": dropout}


def conversations() -> dict[str, Any]:
    template = str(ROOT / "configs/language/chatml.jinja")
    data = {"messages_column_name": "messages", "chat_template": template, "max_length": 96}
    model = {"task": "text-generation", "model_type": "llama", "tokenizer_vocab_size": 300}
    model |= {"config_overrides": SMALL | {"max_position_embeddings": 128}}
    return {"model": model, "data": data, "dropout": {"insert": {"embedding": 0.2, "hidden": 0.2}}}


CASES: dict[str, tuple[Callable[[int], dict], Callable[[], dict], dict[str, Any]]] = {
    "conversations": (talk, conversations, {}),
    "images": (picture, images, {"image": Image(decode=False)}),
    "sounds": (clip, sounds, {"audio": Audio(sampling_rate=8000, decode=False)}),
}


@pytest.fixture(scope="module", params=CASES)
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    row_of, sections, casts = CASES[request.param]
    folder, splits = tmp_path_factory.mktemp(request.param), {}
    for split, size in {"train": 16, "validation": 4, "test": 4}.items():
        rows = Dataset.from_list([row_of(number) for number in range(size)])
        for column, kind in casts.items():
            rows = rows.cast(Features({**rows.features, column: FILE})).cast_column(column, kind)
        splits[split] = rows
    DatasetDict(splits).save_to_disk(folder / "rows")
    given = sections()
    given["data"] = {"path": str(folder / "rows")} | given["data"]
    train = {"global_batch_size": 8, "max_steps": 3, "use_cpu": True, "learning_rate": 1e-2}
    return RunConfig.model_validate(
        {"name": "run", "output_dir": str(folder), "train": train, **given}
    )


def outcome_of(config: RunConfig, name: str, folder: Path, expected: Any) -> Any:
    """A layout of one process, in this one, beside the plain loop."""
    (layout,) = parse_layouts(name)
    place = folder / "layout"
    place.mkdir()
    worker.run(stage.short_run(config, layout, place), place, layout)
    step_size = config.train.learning_rate
    return compare(name, stage.gather(place), expected, 0.0, step_size=step_size)


def test_micro_batches_change_no_mask_and_no_input(config, tmp_path):
    outcome = outcome_of(config, "accumulate:4", tmp_path, stage.reference(config, tmp_path))
    assert outcome.equal, outcome.differences
    assert outcome.masks > 3 * 8


def equal_or_said(config: RunConfig, layouts: str) -> None:
    outcomes = stage.verify_sync(config, parse_layouts(layouts), lambda line: None)
    assert all(outcome.equal for outcome in outcomes), "\n".join(map(str, outcomes))


@pytest.mark.drill
@pytest.mark.timeout(900)
@pytest.mark.parametrize("config", ["images"], indirect=True)
def test_two_processes_change_no_mask_and_no_partner(config):
    equal_or_said(config, "padding,ddp:2")


@pytest.mark.drill
@pytest.mark.timeout(900)
@pytest.mark.parametrize("config", ["images"], indirect=True)
def test_a_resume_changes_no_mask_and_no_partner(config):
    equal_or_said(config, "resume:1-2")


@pytest.mark.parametrize("config", ["images"], indirect=True)
def test_another_partner_is_seen_in_the_losses(config, tmp_path, monkeypatch):
    expected = stage.reference(config, tmp_path)
    monkeypatch.setattr(TrainingStream, "_partner_of", lambda stream, step, place: 7 - place)
    outcome = outcome_of(config, "single", tmp_path, expected)
    assert any("the loss of step 0" in line for line in outcome.differences)
    assert not any("masks" in line or "visits" in line for line in outcome.differences)
