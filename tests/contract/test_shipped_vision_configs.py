"""Every configuration of images that ships: `check` accepts it, each of its rates finds a site.

Models of the hub are stood in for by small ones of the same architecture; the images are noise, in
folders and in parquet files.
"""

import io
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pillow
from transformers import AutoConfig, AutoModelForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from pipeline.check import check, plan
from pipeline.config.load import ROOT, load_config
from pipeline.config.schema import RunConfig

FOLDER = ROOT / "configs" / "vision"
EDGE = 28
# The small model behind each configuration; None: it is made from scratch and needs no stand-in.
STAND_INS = {
    "dinov2_base": ("dinov2", {"patch_size": 14, "hidden_size": 16, "num_hidden_layers": 2,
                               "num_attention_heads": 2}),
    "fashion_mnist": None,
    "quickstart": None,
    "swin_tiny": ("swin", {"patch_size": 2, "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2],
                           "window_size": 7}),
    "vit_base": ("vit", {"patch_size": 14, "hidden_size": 16, "num_hidden_layers": 2,
                         "num_attention_heads": 2, "intermediate_size": 32}),
}  # fmt: skip


def picture(number: int, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (EDGE, EDGE, 3), dtype=np.uint8)
    file = io.BytesIO()
    Pillow.fromarray(pixels).convert(mode).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> Path:
    """A folder with one small saved model an architecture, and the same images twice."""
    folder = tmp_path_factory.mktemp("vision")
    for model_type, shape in filter(None, STAND_INS.values()):
        made_of = AutoConfig.for_model(model_type, image_size=EDGE, **shape)
        AutoModelForImageClassification.from_config(made_of).save_pretrained(folder / model_type)
        ViTImageProcessorPil(size={"height": EDGE, "width": EDGE}).save_pretrained(
            folder / model_type
        )
    for split, num_rows in {"train": 256, "validation": 8, "test": 8}.items():
        for number in range(num_rows):
            path = folder / "photos" / split / ("cat", "dog")[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(number))
        save_parquet(folder / f"{split}.parquet", num_rows)
    return folder


def save_parquet(path: Path, num_rows: int) -> None:
    features = Features({"image": Image(decode=False), "label": Value("string")})
    files = [{"bytes": picture(number, "L"), "path": None} for number in range(num_rows)]
    labels = ["cat", "dog"] * (num_rows // 2)
    Dataset.from_dict({"image": files, "label": labels}, features=features).to_parquet(path)


def shipped(name: str, folder: Path, tmp_path: Path) -> RunConfig:
    overrides = [f"output_dir={tmp_path}"]
    stand_in = STAND_INS[name]
    if stand_in is not None:
        overrides += [f"model.model_name_or_path={folder / stand_in[0]}", "train.bf16=false"]
        overrides += [f"data.data_dir={folder / 'photos'}"]
    if name == "dinov2_base":
        overrides += [f"model.config_overrides.image_size={EDGE}"]
    if name == "fashion_mnist":
        files = {split: folder / f"{split}.parquet" for split in ("train", "test")}
        overrides += [f"data.data_files.{split}={path}" for split, path in files.items()]
        overrides += [f"data.ood.mnist.data_files={files['test']}"]
        overrides += ["data.train_split=train[:200]", "data.validation_split=train[200:]"]
    return load_config(FOLDER / f"{name}.yaml", overrides)


def test_every_shipped_configuration_is_tried_here():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == STAND_INS.keys()


@pytest.mark.parametrize("name", STAND_INS)
def test_check_accepts_it_and_each_of_its_rates_is_in_force(name, stand_ins, tmp_path):
    config = shipped(name, stand_ins, tmp_path)
    assert check(config)[-1] == "No errors."
    assert list(tmp_path.iterdir()) == []
    found: dict[tuple[bool, str], float] = {}
    for site in plan(config).in_force():
        where = site.door == "inserted", site.role
        found[where] = max(site.rate, found.get(where, 0))
    asked = {(False, role): rate for role, rate in config.dropout.rates().items() if rate}
    inserted = config.dropout.insert.model_dump().items()
    asked |= {(True, role): rate for role, rate in inserted if rate}
    assert found == pytest.approx(found | asked)
