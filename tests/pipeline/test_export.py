"""`masklock export`: one plain Hugging Face model that answers as the run's model does."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pipeline.config.load import dump_config
from pipeline.errors import RunFolderError
from pipeline.export import export
from pipeline.modality.tokenizer import load_tokenizer
from pipeline.model import build_model, load_trained, plan_for
from pipeline.records import RunFolder, write_json, write_text

LABELS = ("animal", "colour")
LORA = {"peft_type": "LORA", "r": 2, "target_modules": ["query", "value"], "lora_alpha": 16}


@pytest.fixture
def trained(run_config, pretrained, tmp_path):
    """Makes a run folder as a training leaves it, with every trained weight moved."""

    def make(peft):
        config = run_config(model={"model_name_or_path": str(pretrained)}, peft=peft)
        run = RunFolder(tmp_path / "runs" / "run")
        tokenizer = load_tokenizer(config, [])
        plan = plan_for(config, LABELS, tokenizer)
        model = build_model(config, LABELS, plan, tokenizer)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        write_text(run.config, dump_config(config))
        write_json(run.plan, plan.to_json())
        write_json(run.labels, list(LABELS))
        model.save_pretrained(run.model)
        tokenizer.save_pretrained(run.model)
        return run, load_trained(run.model, config, LABELS, plan, tokenizer).eval()

    return make


@pytest.mark.parametrize("peft", [LORA, None])
def test_the_export_answers_as_the_run_does_in_plain_transformers(trained, tmp_path, capfd, peft):
    run, model = trained(peft)
    capfd.readouterr()
    folder = export(run, tmp_path / "out")
    assert "Writing" not in capfd.readouterr().err
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = AutoTokenizer.from_pretrained(folder)(["the red cow"], return_tensors="pt")
    batch.pop("token_type_ids", None)
    torch.testing.assert_close(plain(**batch).logits, model(**batch).logits, atol=1e-5, rtol=0)
    assert plain.config.id2label == {0: "animal", 1: "colour"}
    assert not [name for name, _ in plain.named_parameters() if "lora" in name]


def test_a_run_without_model_is_not_exported(tmp_path):
    with pytest.raises(RunFolderError, match="no trained model: train the run to its end"):
        export(RunFolder(tmp_path), tmp_path / "out")


def test_nothing_is_overwritten(trained, tmp_path):
    run, _ = trained(None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").touch()
    with pytest.raises(RunFolderError, match="is not empty; name a new folder"):
        export(run, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["letter.txt"]


def test_an_export_that_fails_leaves_no_folder(trained, tmp_path):
    run, _ = trained(None)
    (run.model / "model.safetensors").unlink()
    with pytest.raises(Exception, match=r"model\.safetensors|could not be"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
