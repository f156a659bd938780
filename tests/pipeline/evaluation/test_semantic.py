"""How many things a model says, and which of them it should: by hand and by the libraries."""

import math

import numpy as np
import pytest
import torch
from sacrebleu import sentence_chrf
from transformers import BertConfig, BertForSequenceClassification

from pipeline.config.schema import RunConfig
from pipeline.errors import ModelError
from pipeline.evaluation.bayes_risk import chrf, least_risk, token_f1
from pipeline.evaluation.entailment import Entailment
from pipeline.evaluation.semantic import (
    clusters,
    normalised,
    same_direction,
    same_words,
    semantic_entropy,
    weighted_semantic_entropy,
)

TEXTS = ["Paris.", "paris", "It is Paris", "Rome", "PARIS!"]


def config_of(folder, **evaluation):
    model = {"task": "text-generation", "model_type": "llama", "model_revision": "other"}
    generation = {"same_meaning": "entailment", "entailment_model": str(folder)} | evaluation
    return RunConfig.model_validate(
        {"name": "t", "model": model, "data": {"path": "json"},
         "evaluation": {"generation": generation}}
    )  # fmt: skip


def test_equal_words_are_one_meaning_and_the_entropy_is_that_of_their_shares():
    found = clusters(5, same_words(TEXTS))
    assert found == [0, 0, 1, 2, 0]
    shares = np.array([3, 1, 1]) / 5
    assert semantic_entropy(found) == pytest.approx(-(shares * np.log(shares)).sum())
    assert semantic_entropy([0, 0, 0]) == 0


def test_the_weighted_form_adds_the_probabilities_of_a_meaning():
    log_p = [-1.0, -2.0, -0.5, -900.0, -3.0]
    mass = np.array([math.exp(-1) + math.exp(-2) + math.exp(-3), math.exp(-0.5), 0.0])
    shares = mass[mass > 0] / mass.sum()
    expected = -(shares * np.log(shares)).sum()
    assert weighted_semantic_entropy([0, 0, 1, 2, 0], log_p) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "plain"), [("  The  CAT! ", "the cat"), ("ﬁn–", "fin"), ("?!", "?!"), ("", "")]
)
def test_texts_are_compared_without_case_punctuation_and_forms(text, plain):
    assert normalised(text) == plain


def test_embeddings_of_one_direction_are_one_meaning():
    vectors = [[1.0, 0.0], [3.0, 0.1], [0.0, 2.0], [0.0, 0.0]]
    assert clusters(4, same_direction(vectors, 0.9)) == [0, 0, 1, 2]


def test_chrf_is_sacrebleu_s_and_words_are_counted_by_hand():
    assert chrf("the cat sat", "the cats sit") == pytest.approx(
        sentence_chrf("the cat sat", ["the cats sit"]).score / 100
    )
    assert (chrf("", ""), chrf("", "a")) == (1.0, 0.0)
    assert token_f1("The cat sat, sat", "cat sat on") == pytest.approx(2 * 2 / (4 + 3))
    assert (token_f1("", " "), token_f1("a", "")) == (1.0, 0.0)


def test_the_text_of_least_risk_is_that_most_like_all_others():
    texts = ["the cat sat", "a dog", "the cat sits", "the cats sat"]
    gains = [sum(sentence_chrf(t, [r]).score for r in texts) for t in texts]
    assert least_risk(texts, chrf) == int(np.argmax(gains))


def entailing(folder, tokenizer_from, labels):
    config = BertConfig(vocab_size=300, hidden_size=24, num_hidden_layers=1, num_attention_heads=3)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in config.id2label.items()}
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer_from.save_pretrained(folder)


@pytest.fixture
def tokenizer(run_config):
    from pipeline.modality.tokenizer import load_tokenizer

    return load_tokenizer(run_config(), ["the red cow"] * 3)


def test_texts_that_entail_each_other_are_one_meaning(tmp_path, tokenizer):
    entailing(tmp_path, tokenizer, ("CONTRADICTION", "ENTAILMENT"))
    found = Entailment(config_of(tmp_path), torch.device("cpu"))
    for bias, expected in (([0.0, 50.0], [0, 0, 0]), ([50.0, 0.0], [0, 1, 0])):
        found._model.classifier.bias.data = torch.tensor(bias)
        assert clusters(3, found.same(["a cow", "red", "a cow"])) == expected


def test_a_classifier_of_something_else_is_refused(tmp_path, tokenizer):
    entailing(tmp_path, tokenizer, ("good", "bad"))
    with pytest.raises(ModelError, match=r"tells good, bad, none of which is `entailment`"):
        Entailment(config_of(tmp_path), torch.device("cpu"))


def test_settings_that_say_nothing_are_refused():
    with pytest.raises(ValueError, match="go together"):
        config_of("x", same_meaning="match")
    with pytest.raises(ValueError, match="one sampled continuation"):
        config_of("x", num_samples=1)
