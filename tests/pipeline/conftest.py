"""A small pretrained model with its tokenizer and data, written to a temporary folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.schema import RunConfig

BERT = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2}
BERT |= {"intermediate_size": 40, "max_position_embeddings": 34}
LABELS = ("animal", "colour")


@pytest.fixture
def rows_in(tmp_path) -> dict[str, str]:
    """Data files by split."""
    files = {}
    for split, count in (("train", 24), ("validation", 6), ("test", 6)):
        lines = [
            json.dumps({"text": f"the {'red' if n % 2 else 'cow'} {n}", "label": LABELS[n % 2]})
            for n in range(count)
        ]
        path = tmp_path / f"{split}.jsonl"
        path.write_text("\n".join(lines))
        files[split] = str(path)
    return files


@pytest.fixture
def run_config(rows_in, tmp_path) -> Callable[..., RunConfig]:
    """Makes the configuration of a run; sections are merged over those of a small BERT."""

    def make(**sections: Any) -> RunConfig:
        small = {"model_type": "bert", "config_overrides": BERT, "tokenizer_vocab_size": 300}
        model = sections.pop("model", small)
        values: dict[str, Any] = {
            "name": "run",
            "output_dir": str(tmp_path / "runs"),
            "model": {"task": "text-classification"} | model,
            "data": {"path": "json", "data_files": rows_in, "max_length": 16},
            "train": {"global_batch_size": 8, "max_steps": 2, "use_cpu": True},
        }
        for name, section in sections.items():
            merged = isinstance(section, dict) and name in values
            values[name] = values[name] | section if merged else section
        return RunConfig.model_validate(values)

    return make


@pytest.fixture
def pretrained(run_config, tmp_path) -> Path:
    """The folder of a small BERT without head, with its tokenizer."""
    from transformers import AutoModel

    from pipeline.modality.tokenizer import fit_to_tokenizer, load_tokenizer
    from pipeline.model_config import model_config

    config = run_config()
    tokenizer = load_tokenizer(config, ["the red cow"] * 3)
    hf_config = model_config(config, None)
    fit_to_tokenizer(hf_config, tokenizer, config)
    folder = tmp_path / "pretrained"
    AutoModel.from_config(hf_config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
