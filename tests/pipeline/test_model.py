"""Models from a configuration: where weights come from, and what is refused before and after."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import ModelError
from pipeline.model import build_model, load_trained, plan_for
from pipeline.records import sha256_of_file

LABELS = ("animal", "colour")
LORA = {"peft_type": "LORA", "r": 2, "target_modules": ["query"]}


def build(config, labels=LABELS):
    return build_model(config, labels, plan_for(config, labels))


def rewrite(folder, change):
    """Change the saved weights."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def test_new_weights_come_from_the_seed_alone(run_config):
    torch.manual_seed(1)
    first, state = build(run_config(seed=3)), torch.get_rng_state()
    again = build(run_config(seed=3))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first.parameters(), again.parameters()))
    other = build(run_config(seed=4))
    assert not torch.equal(first.classifier.weight, other.classifier.weight)


def test_pretrained_weights_are_loaded_in_silence(run_config, pretrained, capfd, caplog):
    model = build(run_config(model={"model_name_or_path": str(pretrained)}))
    for name, saved in load_file(pretrained / "model.safetensors").items():
        assert torch.equal(model.bert.get_parameter(name), saved), name
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


def test_weights_that_the_body_lacks_are_told(run_config, pretrained, caplog):
    rewrite(pretrained, lambda weights: {n: w for n, w in weights.items() if "pooler" not in n})
    build(run_config(model={"model_name_or_path": str(pretrained)}))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "start anew: bert.pooler.dense.bias, bert.pooler.dense.weight" in record.getMessage()


def test_a_head_of_another_shape_starts_anew_and_is_told(run_config, pretrained, caplog):
    three = build(run_config(model={"model_name_or_path": str(pretrained)}), ("a", "b", "c"))
    three.save_pretrained(pretrained)
    model = build(run_config(model={"model_name_or_path": str(pretrained)}))
    assert model.classifier.weight.shape == (2, 24)
    assert "classifier.weight ([3, 24], here [2, 24])" in caplog.text


def test_a_body_of_another_shape_is_refused(run_config, pretrained):
    model = {"model_name_or_path": str(pretrained), "config_overrides": {"intermediate_size": 48}}
    with pytest.raises(ModelError, match=r"other shapes .* \(\[40\], here \[48\]\).* in all"):
        build(run_config(model=model))


def test_weights_must_have_the_sum_asked_for(run_config, pretrained):
    found = sha256_of_file(pretrained / "model.safetensors")
    model = {"model_name_or_path": str(pretrained), "weights_sha256": found}
    build(run_config(model=model))
    with pytest.raises(ModelError, match=f"its sha256 is {found}, .* Nothing was loaded"):
        build(run_config(model=model | {"weights_sha256": "0" * 64}))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"model_name_or_path": "bert-of-nobody"}, "HF_HUB_OFFLINE is set.*To work offline"),
        ({"model_name_or_path": "./nowhere"}, "there is no such folder"),
        ({"model_name_or_path": "package:no_such_package/m"}, "no_such_package is not installed"),
        ({"model_name_or_path": "package:pipeline/none"}, "pipeline has no folder 'none'"),
        ({"model_type": "brt"}, "not an architecture of transformers; near it: bert, bart"),
        (
            {"model_type": "bert", "config_overrides": {"num_layer": 1}},
            r"bert has no num_layer \(did you mean num_hidden_layers\?\)",
        ),
        (
            {"model_type": "bert", "config_overrides": {"hidden_size": "big"}},
            "bert refuses them: .*hidden_size",
        ),
        (
            {"model_type": "bert", "config_overrides": {"num_attention_heads": 7}},
            "cannot be built for text-classification: .*multiple of the number of attention",
        ),
        ({"model_type": "vit"}, "vit cannot be built for text-classification"),
    ],
)
def test_models_that_cannot_be_are_refused_before_weights_load(run_config, model, message):
    with pytest.raises(ModelError, match=f"(?s){message}"):
        plan_for(run_config(model=model), LABELS)


@pytest.mark.parametrize(("model_type", "longest"), [("bert", 34), ("roberta", 32), ("mpnet", 32)])
def test_text_longer_than_the_model_is_refused(run_config, model_type, longest):
    model = run_config().model.model_dump() | {"model_type": model_type}
    overrides = model["config_overrides"] | {"pad_token_id": 1}
    model["config_overrides"] = overrides
    plan_for(run_config(model=model, data={"max_length": longest}), LABELS)
    with pytest.raises(ModelError, match=f"allows {longest} positions; set data.max_length to at"):
        plan_for(run_config(model=model, data={"max_length": longest + 1}), LABELS)


XLNET = {"d_model": 24, "n_head": 3, "n_layer": 1, "d_inner": 40, "vocab_size": 61}
BLOOM = {"hidden_size": 24, "n_head": 3, "n_layer": 1, "vocab_size": 61}


@pytest.mark.parametrize(("model_type", "sizes"), [("xlnet", XLNET), ("bloom", BLOOM)])
def test_models_without_a_longest_text_take_any(run_config, model_type, sizes):
    model = {"model_type": model_type, "config_overrides": sizes}
    off = {} if model_type == "bloom" else {"overrides": {"transformer.*": 0}}
    plan_for(run_config(model=model, dropout=off, data={"max_length": 100_000}), LABELS)


def test_a_field_that_only_the_modelling_file_knows_can_be_set(run_config):
    sizes = {"num_heads": 3, "d_model": 24, "d_kv": 8, "d_ff": 9, "num_layers": 1}
    overrides = sizes | {"decoder_start_token_id": 0, "vocab_size": 61}
    model = {"model_type": "t5", "config_overrides": overrides}
    assert build(run_config(model=model)).config.decoder_start_token_id == 0


def test_rates_stand_in_the_models_own_configuration(run_config):
    model = build(
        run_config(dropout={"hidden": 0.3, "embedding": 0.2, "attention": 0, "head": 0.4})
    )
    found = model.config
    assert (found.hidden_dropout_prob, found.attention_probs_dropout_prob) == (0.3, 0.0)
    assert found.classifier_dropout == 0.4
    assert found.id2label == {0: "animal", 1: "colour"}


@pytest.mark.parametrize(("rate", "implementation"), [(0.1, "keyed"), (0, "sdpa")])
def test_attention_is_keyed_only_where_it_drops(run_config, rate, implementation):
    model = build(run_config(dropout={"attention": rate}))
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("peft", [None, LORA])
def test_a_trained_model_comes_back_as_it_was_saved(run_config, pretrained, tmp_path, peft):
    config = run_config(model={"model_name_or_path": str(pretrained)}, peft=peft)
    model = build(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += parameter.requires_grad * 0.1
    model.save_pretrained(tmp_path / "saved")
    again = load_trained(tmp_path / "saved", config, LABELS, plan_for(config, LABELS)).eval()
    ids = torch.tensor([[2, 3, 4]])
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_trained_model_without_its_head_is_refused(run_config, pretrained):
    config = run_config(model={"model_name_or_path": str(pretrained)})
    with pytest.raises(ModelError, match="weights are missing .*: classifier.bias, classifier.w"):
        load_trained(pretrained, config, LABELS, plan_for(config, LABELS))


def test_an_adapter_without_places_is_refused(run_config, pretrained):
    peft = LORA | {"target_modules": ["nowhere"]}
    with pytest.raises(ModelError, match="peft: the LORA adapter cannot .* No modules were"):
        build(run_config(model={"model_name_or_path": str(pretrained)}, peft=peft))
