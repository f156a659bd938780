"""Every configuration that ships: `check` accepts it, and each of its dropout rates finds a site.

Models of the hub are stood in for by small ones of the same architecture, made from configurations.
"""

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from pipeline.check import check, plan
from pipeline.config.load import ROOT, load_config
from pipeline.config.schema import RunConfig
from pipeline.corpora import BUILTIN
from pipeline.modality.tokenizer import _trained_tokenizer

FOLDER = ROOT / "configs" / "language"
# The architecture behind each configuration; None: it is made from scratch and needs no stand-in.
ARCHITECTURES = {
    "chat_lora": "qwen2",
    "code_lm": None,
    "code_lora": "qwen2",
    "intents": "bert",
    "llama_lora": "llama",
    "modernbert": "modernbert",
    "quickstart": "bert",
    "qwen_lora": "qwen3",
}
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 8,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPECIAL = {
    "qwen2": {"num_key_value_heads": 1, "vocab_size": 400},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 8},
    "llama": {"num_key_value_heads": 1},
    "modernbert": {"cls_token_id": 1, "sep_token_id": 2},
    "bert": {},
}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> Path:
    """A folder with one small saved model an architecture, and data with intents."""
    folder = tmp_path_factory.mktemp("stand_ins")
    core = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "[END]": 2}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="[END]")
    for model_type, fields in SPECIAL.items():
        made_of = AutoConfig.for_model(model_type, **SHAPE | fields)
        AutoModel.from_config(made_of).save_pretrained(folder / model_type)
        tokenizer.save_pretrained(folder / model_type)
    chatting = _trained_tokenizer(["ask", "tell"], 300)  # Qwen2's own class wants merges of bytes
    chatting.chat_template = (FOLDER / "chatml.jinja").read_text()
    chatting.save_pretrained(folder / "qwen2")
    save_rows(folder / "intents_data", text=["a question"] * 64, intent=["ask", "tell"] * 32)
    turns = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "tell"}]
    save_rows(folder / "chat_lora_data", messages=[turns] * 32)
    save_rows(folder / "code_lora_data", prompt=["def f("] * 32, completion=["): return 1"] * 32)
    return folder


def save_rows(folder: Path, **columns: list) -> None:
    splits = dict.fromkeys(("train", "validation", "test"), Dataset.from_dict(columns))
    DatasetDict(splits).save_to_disk(folder)


@pytest.fixture(scope="module", autouse=True)
def _corpus_read_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, read in BUILTIN.items():
            patch.setitem(BUILTIN, name, functools.cache(read))
        yield


def shipped(name: str, stand_ins: Path, tmp_path: Path) -> RunConfig:
    overrides = [f"output_dir={tmp_path}"]
    if ARCHITECTURES[name] is not None:
        folder = stand_ins / ARCHITECTURES[name]
        overrides += [f"model.model_name_or_path={folder}", "model.weights_sha256=null"]
    if (stand_ins / f"{name}_data").is_dir():
        overrides += [f"data.path={stand_ins / f'{name}_data'}"]
    return load_config(FOLDER / f"{name}.yaml", overrides)


def test_every_shipped_configuration_is_tried_here():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == ARCHITECTURES.keys()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_check_accepts_it_and_writes_nothing(name, stand_ins, tmp_path):
    assert check(shipped(name, stand_ins, tmp_path))[-1] == "No errors."
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_of_its_rates_is_in_force_at_a_site(name, stand_ins, tmp_path):
    config = shipped(name, stand_ins, tmp_path)
    found = {(site.door == "inserted", site.role, site.rate) for site in plan(config).in_force()}
    asked = {(False, role, rate) for role, rate in config.dropout.rates().items() if rate}
    inserted = config.dropout.insert.model_dump().items()
    asked |= {(True, role, rate) for role, rate in inserted if rate}
    assert asked - found == set()
