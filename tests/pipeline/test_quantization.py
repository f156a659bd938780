"""QLoRA: adapters on quantized weights, masked as on plain ones, and what is refused."""

import importlib.util
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import model as model_module
from pipeline import quantization
from pipeline.check import check
from pipeline.config.load import dump_config
from pipeline.errors import InputError, LayoutError, ModelError
from pipeline.evaluation.stage import evaluate
from pipeline.export import export
from pipeline.modality.tokenizer import fit_to_tokenizer, load_tokenizer
from pipeline.model import build_model, load_trained, plan_for
from pipeline.model_config import model_config
from pipeline.records import RunFolder
from pipeline.train import train
from pipeline.verify import stage, worker
from pipeline.verify.compare import compare
from pipeline.verify.layouts import parse_layouts

LLAMA = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
LORA = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
LABELS = ("animal", "colour")
RATES = {"adapter": 0.2, "attention": 0.1, "insert": {"embedding": 0.1, "hidden": 0.2}}

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed (the extra `quantization`)",
)


@pytest.fixture
def qlora(run_config, tmp_path):
    """Makes the configuration of an adapter on a small Llama, quantized unless told otherwise."""
    model = {"task": "text-generation", "model_type": "llama", "config_overrides": LLAMA}
    scratch = run_config(model=model | {"tokenizer_vocab_size": 300})
    tokenizer = load_tokenizer(scratch, ["the red cow"] * 3)
    hf_config = model_config(scratch, None)
    fit_to_tokenizer(hf_config, tokenizer, scratch)
    folder = tmp_path / "llama"
    with torch.random.fork_rng():
        torch.manual_seed(5)
        AutoModelForCausalLM.from_config(hf_config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    def make(quantization_config=NF4, **sections):
        model = {"task": "text-generation", "model_name_or_path": str(folder)}
        model |= {"quantization_config": quantization_config} if quantization_config else {}
        return run_config(**{"model": model, "peft": LORA, "dropout": RATES} | sections)

    return make


@needs_bitsandbytes
def test_a_quantized_base_has_the_plan_of_the_plain_one(qlora):
    plan = plan_for(qlora())
    assert plan.to_json() == plan_for(qlora(None)).to_json()
    assert not any("base_layer" in site.site for site in plan.sites)
    model = build_model(qlora(), None, plan)
    projection = model.base_model.model.model.layers[0].self_attn.q_proj
    assert type(projection.base_layer).__name__ == "Linear4bit"
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)


@needs_bitsandbytes
@pytest.mark.parametrize("name", ["accumulate:4", "checkpointing"])
def test_masks_gradients_and_weights_are_those_of_a_plain_loop_over_plain_weights(
    qlora, tmp_path, monkeypatch, name
):
    config, frozen = qlora(), quantization.with_frozen_weights
    with monkeypatch.context() as patch:  # the loop sees nn.Linear alone, of the same values
        patch.setattr(
            model_module.quantization,
            "with_frozen_weights",
            lambda config, model: quantization.dequantized(frozen(config, model)),
        )
        expected = stage.reference(config, tmp_path)
    (layout,) = parse_layouts(name)
    folder = tmp_path / name.replace(":", "-")
    folder.mkdir()
    worker.run(stage.short_run(config, layout, folder), folder, layout)
    outcome = compare(name, stage.gather(folder), expected, 0.0)
    assert outcome.equal, outcome
    assert outcome.masks > 100
    assert outcome.gradient_difference < 1e-5


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_the_head_of_a_classifier_is_trained_in_plain_weights(run_config, pretrained, bits):
    section = {"quant_method": "bitsandbytes", bits: True}
    model = {"model_name_or_path": str(pretrained), "quantization_config": section}
    config = run_config(model=model, peft={"r": 2, "target_modules": ["query"]})
    model = build_model(config, LABELS, plan_for(config, LABELS))
    loss = model(input_ids=torch.ones(2, 5, dtype=torch.long), labels=torch.tensor([0, 1])).loss
    loss.backward()
    head = model.base_model.model.classifier.modules_to_save.default
    assert type(head) is nn.Linear
    assert head.weight.grad.abs().sum() > 0


@needs_bitsandbytes
def test_an_evaluation_in_between_changes_no_weight(qlora):
    model = build_model(qlora(), None, plan_for(qlora()))
    ids = torch.arange(12)[None]
    before = model.train().eval()(ids).logits
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        assert model(ids).logits.equal(before)
    assert all(value.equal(weights[name]) for name, value in model.state_dict().items())


@needs_bitsandbytes
def test_a_run_is_trained_evaluated_and_exported_as_one_plain_model(qlora, tmp_path):
    config = qlora(evaluation={"knn_neighbours": 5, "num_mc_passes": 2})
    assert train(config, say=lambda line: None) == 0
    run = RunFolder(tmp_path / "runs" / "run")
    evaluate(run, config, say=lambda line: None)
    folder = export(run, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert not hasattr(plain.config, "quantization_config")
    assert {type(m) for m in plain.modules() if "Linear" in type(m).__name__} == {nn.Linear}
    batch = AutoTokenizer.from_pretrained(folder)("the red cow", return_tensors="pt")
    trained = load_trained(run.model, config, None, plan_for(config)).eval()
    ids = batch["input_ids"]
    torch.testing.assert_close(plain(ids).logits, trained(ids).logits, atol=1e-5, rtol=0)


@needs_bitsandbytes
def test_a_way_back_that_is_missing_is_said(qlora, monkeypatch):
    base = build_model(qlora(), None, plan_for(qlora())).base_model.model

    def missing():
        raise NotImplementedError

    monkeypatch.setattr(base, "dequantize", missing)
    with pytest.raises(ModelError, match="quantized with bitsandbytes, which .* cannot turn back"):
        quantization.dequantized(base)


@needs_bitsandbytes
def test_weights_that_came_quantized_need_an_adapter(qlora):
    model = build_model(qlora(), None, plan_for(qlora())).base_model.model
    config = qlora(None, peft=None, dropout={})
    with pytest.raises(ModelError, match="are quantized and cannot be trained .* peft section"):
        quantization.with_frozen_weights(config, model)


def test_a_method_that_is_not_installed_is_refused_by_check(qlora, monkeypatch):
    monkeypatch.setitem(sys.modules, "gptqmodel", None)
    with pytest.raises(InputError, match="asks for gptq, which cannot be used here: .* Install it"):
        check(qlora({"quant_method": "gptq", "bits": 4}))


@pytest.mark.parametrize(
    ("engine", "deepspeed", "named"),
    [("FSDP", {}, "FSDP"), ("DEEPSPEED", {"zero_optimization": {"stage": 3}}, "ZeRO 3")],
)
def test_engines_that_cut_weights_are_refused(qlora, engine, deepspeed, named):
    with pytest.raises(LayoutError, match=f"{named} do not go together .* ddp, zero1 or zero2"):
        quantization.require_whole_weights(qlora(), engine, deepspeed)
    quantization.require_whole_weights(qlora(None), engine, deepspeed)
    quantization.require_whole_weights(qlora(), "DEEPSPEED", {"zero_optimization": {"stage": 2}})


def test_the_section_survives_the_run_folder(qlora):
    assert "load_in_4bit: true" in dump_config(qlora())
