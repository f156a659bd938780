"""The tokenizer of a run: its own, or one made from the training text."""

import time

import pytest

from pipeline.errors import ModelError
from pipeline.modality.tokenizer import fit_to_tokenizer, load_tokenizer
from pipeline.model_config import model_config

TEXTS = ["a cat sat on the mat", "the cat sat", "über die Straße"] * 5


def test_a_model_from_scratch_gets_a_tokenizer_of_its_text(run_config):
    tokenizer = load_tokenizer(run_config(), TEXTS)
    assert len(tokenizer) <= 300
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|end|>")
    for text in (*TEXTS, "never seen: 漢字"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("the cat sat")["input_ids"]) < len("the cat sat")


def test_the_same_text_makes_the_same_tokenizer(run_config):
    first, again = (load_tokenizer(run_config(), iter(TEXTS)) for _ in range(2))
    assert first.get_vocab() == again.get_vocab()


def test_a_pretrained_model_brings_its_own(run_config, pretrained):
    tokenizer = load_tokenizer(run_config(model={"model_name_or_path": str(pretrained)}), [])
    assert tokenizer.pad_token == "<|pad|>"


def test_a_tokenizer_that_is_not_found_says_where_it_was_looked_for(run_config):
    model = run_config().model.model_dump() | {"tokenizer_name_or_path": "tokenizer-of-nobody"}
    with pytest.raises(ModelError, match=r"The tokenizer 'tokenizer-of-nobody' .* To work offline"):
        load_tokenizer(run_config(model=model), [])


def test_a_new_model_takes_the_vocabulary_of_its_tokenizer(run_config):
    config = run_config()
    tokenizer, hf_config = load_tokenizer(config, TEXTS), model_config(config, None)
    fit_to_tokenizer(hf_config, tokenizer, config)
    assert hf_config.vocab_size == len(tokenizer)
    assert (hf_config.pad_token_id, hf_config.eos_token_id) == (0, 1)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(run_config, pretrained):
    config = run_config(model={"model_name_or_path": str(pretrained)})
    tokenizer, hf_config = load_tokenizer(config, []), model_config(config, None)
    tokenizer.add_tokens([f"<{n}>" for n in range(9)])
    with pytest.raises(ModelError, match=r"has \d+ tokens, the model \d+: they do not belong"):
        fit_to_tokenizer(hf_config, tokenizer, config)


def test_a_hub_that_does_not_answer_is_said_in_seconds(run_config, monkeypatch):
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    monkeypatch.setattr("huggingface_hub.hf_hub_url", lambda *a, **k: "http://127.0.0.1:9/nothing")
    model = run_config().model.model_dump() | {"tokenizer_name_or_path": "nobody/nothing"}
    started = time.monotonic()
    with pytest.raises(ModelError, match="It does not answer"):
        load_tokenizer(run_config(model=model), [])
    assert time.monotonic() - started < 5
