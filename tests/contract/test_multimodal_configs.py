"""Multimodal configurations that ship: accepted, every rate in force; one run whole, to its report.

Encoders of the hub are stood in for by small ones of their architecture.
"""

import json
from pathlib import Path

import pytest
import soundfile
from datasets import Audio, Dataset
from transformers import AutoConfig, AutoModel, Wav2Vec2FeatureExtractor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from monitoring.report import write_report
from pipeline.check import check, plan
from pipeline.config.load import ROOT, load_config
from pipeline.config.schema import RunConfig
from pipeline.corpora import BUILTIN
from pipeline.dropout.lookup import mask_of_run
from pipeline.evaluation.score import rescore, score
from pipeline.evaluation.stage import evaluate
from pipeline.modality.tokenizer import load_tokenizer
from pipeline.records import RunFolder
from pipeline.train import train

FOLDER = ROOT / "configs" / "multimodal"
STAND_INS = {
    "quickstart": {},
    "text_image": {"text": "bert", "image": "vit"},
    "audio_text": {"audio": "wavlm", "text": "bert"},
    "retrieved_context": {"question": "modernbert", "context": "modernbert"},
}
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 24}
SHAPES = {
    "bert": {"vocab_size": 400},
    "modernbert": {"vocab_size": 400, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
                   "cls_token_id": 1, "sep_token_id": 1},
    "vit": {"image_size": 8, "patch_size": 4},
    "wavlm": {"conv_dim": [8, 8], "conv_kernel": [20, 8], "conv_stride": [10, 8],
              "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 5,
              "num_conv_pos_embedding_groups": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> Path:
    """A small model of every architecture with its processor, and rows with every column."""
    folder = tmp_path_factory.mktemp("multimodal")
    texts = BUILTIN["builtin:named-digits"]()["train"].select(range(40))
    trained = load_config(FOLDER / "quickstart.yaml")
    for name, shape in SHAPES.items():
        AutoModel.from_config(AutoConfig.for_model(name, **SMALL, **shape)).save_pretrained(
            folder / name
        )
    for name in ("bert", "modernbert"):
        load_tokenizer(trained, texts["text"][:]).save_pretrained(folder / name)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder / "vit")
    Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(folder / "wavlm")
    tone = [0.1 * (place % 20 - 10) / 10 for place in range(8000)]
    soundfile.write(folder / "tone.wav", tone, 16_000)
    clip = {"bytes": (folder / "tone.wav").read_bytes(), "path": None}
    columns = {
        **dict.fromkeys(("caption", "transcript", "question", "context"), texts["text"][:]),
        "picture": texts["image"][:],
        "audio": [clip] * len(texts),
        "label": [str(label) for label in texts["label"][:]],
    }
    rows = Dataset.from_dict(columns).cast_column("audio", Audio(decode=False))
    for split in ("train", "validation", "test"):
        rows.to_parquet(folder / f"{split}.parquet")
    return folder


def shipped(name: str, folder: Path, tmp_path: Path) -> RunConfig:
    more = [f"output_dir={tmp_path}"]
    if STAND_INS[name]:
        more += [f"data.data_files.{split}={folder}/{split}.parquet"
                 for split in ("train", "validation", "test")]  # fmt: skip
        more += ["train.global_batch_size=8", "train.per_device_train_batch_size=8"]
    more += [f"model.channels.{channel}.model_name_or_path={folder / kind}"
             for channel, kind in STAND_INS[name].items()]  # fmt: skip
    return load_config(FOLDER / f"{name}.yaml", more)


def test_every_shipped_configuration_is_tried_here():
    elsewhere = {"llava"}  # test_image_text.py
    assert {path.stem for path in FOLDER.glob("*.yaml")} - elsewhere == STAND_INS.keys()


@pytest.mark.parametrize("name", STAND_INS)
def test_check_accepts_it_and_each_of_its_rates_is_in_force_at_a_site(name, stand_ins, tmp_path):
    config = shipped(name, stand_ins, tmp_path)
    assert check(config)[-1] == "No errors."
    live = plan(config).in_force()
    assert set(config.dropout.rates().items()) - {(site.role, site.rate) for site in live} == set()
    (masked,) = [dict(site.channels) for site in live if site.role == "modality"]
    assert {name: rate for name, rate in masked.items() if rate} == config.dropout.modality


def test_a_run_trains_is_judged_reported_and_scored_again(stand_ins, tmp_path):
    few = ["train.max_steps=3", "train.eval_steps=3", "train.save_steps=3", "train.use_cpu=true"]
    few += ["train.global_batch_size=16", "train.per_device_train_batch_size=8"]
    few += ["evaluation.num_mc_passes=3", "evaluation.batch_size=8", "wandb.mode=disabled"]
    few += ["data.max_train_samples=48", "data.max_eval_samples=16", f"output_dir={tmp_path}"]
    config = load_config(FOLDER / "quickstart.yaml", few)
    run = RunFolder(tmp_path / config.name)
    assert train(config, say=lambda sentence: None) == 0
    report = evaluate(run, config)
    assert set(report["channels"]["without"]) == {"image", "text"}
    assert set(report["ood"]) == {"photographs", "other_names"}
    page = write_report(run).read_text()
    assert "Without image" in page
    assert "how often in training" in page
    found = mask_of_run(run, config.seed, 2, "fusion.modality", 17, "train")
    assert found["channels"] == {"image": 0.15, "text": 0.3}
    assert found["kept"] >= 1
    rows = tmp_path / "rows.parquet"
    BUILTIN["builtin:named-digits"]()["test"].select(range(9)).remove_columns("label").to_parquet(
        rows
    )
    table = score(run, config, [rows], tmp_path / "scored.parquet")
    again = rescore(run, config, table, [5, 1])
    wanted = ["prediction", "mutual_information", "mahalanobis", "embedding"]
    assert again.select(wanted).to_pylist() == table.select(wanted).take([5, 1]).to_pylist()
    assert json.loads(run.plan.read_text())["sites"][-2]["role"] == "modality"
