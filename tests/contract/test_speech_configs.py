"""Speech configurations that ship: accepted, every rate finds a site; one small run whole.

The model of the hub is stood in for by a small one of its architecture.
"""

from pathlib import Path

import numpy as np
import pytest
from datasets import load_from_disk
from transformers import AutoConfig, AutoModel, Wav2Vec2FeatureExtractor

from pipeline.check import check, plan
from pipeline.config.load import ROOT, load_config
from pipeline.config.schema import RunConfig
from pipeline.corpora import BUILTIN
from pipeline.evaluation.score import rescore, score
from pipeline.evaluation.stage import evaluate
from pipeline.records import RunFolder
from pipeline.sources import load_splits
from pipeline.train import train

FOLDER = ROOT / "configs" / "speech"
STAND_INS = {"quickstart": None, "wav2vec2_base": "wav2vec2"}
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE |= {"intermediate_size": 24, "conv_dim": [8, 8, 8], "num_conv_pos_embeddings": 5}
SHAPE |= {"num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8}
FRONT_END = {"conv_kernel": [20, 8, 4], "conv_stride": [10, 5, 4], "num_feat_extract_layers": 3}


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """Some of the spoken words, saved, and a small model of every architecture."""
    folder = tmp_path_factory.mktemp("speech")
    spoken = BUILTIN["builtin:spoken-words"]()
    sizes = {"train": 48, "validation": 16, "test": 20, "ood": 12}
    for split, size in sizes.items():
        spoken[split] = spoken[split].select(range(size))
    spoken.save_to_disk(folder / "words")
    made_of = AutoConfig.for_model("wav2vec2", **SHAPE, **FRONT_END)
    AutoModel.from_config(made_of).save_pretrained(folder / "wav2vec2")
    Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(folder / "wav2vec2")
    return folder


def shipped(name: str, words: Path, tmp_path: Path, *more: str) -> RunConfig:
    overrides = [f"output_dir={tmp_path}", f"data.path={words / 'words'}", *more]
    if STAND_INS[name] is None:
        overrides += [f"data.ood.other_words.path={words / 'words'}"]
    else:
        overrides += [f"model.model_name_or_path={words / STAND_INS[name]}"]
    return load_config(FOLDER / f"{name}.yaml", overrides)


def test_every_shipped_configuration_is_tried_here():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == STAND_INS.keys()


@pytest.mark.parametrize("name", STAND_INS)
def test_check_accepts_it_and_each_of_its_rates_is_in_force_at_a_site(name, words, tmp_path):
    config = shipped(name, words, tmp_path)
    assert check(config)[-1] == "No errors."
    found = {(site.role, site.rate) for site in plan(config).in_force()}
    assert set(config.dropout.rates().items()) - found == set()


def test_a_run_trains_is_judged_and_its_scored_rows_are_computed_again(words, tmp_path):
    small = [f"model.config_overrides.{n}={v}" for n, v in SHAPE.items() if n != "conv_dim"]
    few = ["train.max_steps=3", "train.eval_steps=3", "train.save_steps=3", "train.use_cpu=true"]
    few += ["train.global_batch_size=16", "train.per_device_train_batch_size=8"]
    few += ["evaluation.num_mc_passes=3", "evaluation.batch_size=8", "wandb.mode=disabled"]
    config = shipped("quickstart", words, tmp_path, *small, *few)
    run = RunFolder(tmp_path / config.name)
    assert train(config, say=lambda sentence: None) == 0
    report = evaluate(run, config)
    assert "other_words" in report["ood"]
    rows = tmp_path / "rows.parquet"
    load_from_disk(words / "words")["test"].remove_columns("label").to_parquet(rows)
    table = score(run, config, [rows], tmp_path / "scored.parquet")
    assert table["text"].to_pylist() == load_splits(config.data)["test"]["transcript"][:]
    assert np.all(np.isfinite(table["rms_db"].to_numpy()))
    again = rescore(run, config, table, [5, 0])
    assert again.equals(table.select(again.column_names).take([5, 0]))
