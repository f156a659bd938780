"""Quality with each channel removed, against plain torch, scikit-learn and a bootstrap by hand."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, log_loss

from pipeline.config.schema import EvaluationConfig, RunConfig
from pipeline.data import load_raw, prepare_data
from pipeline.dropout.context import KeyedDropout
from pipeline.evaluation.channels import channel_section, channels_of_test, logits_without
from pipeline.evaluation.mc_dropout import MonteCarlo
from pipeline.evaluation.predict import Predictor
from pipeline.modality.bundle import modality_of
from pipeline.model import build_model, plan_for

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CONV = {"image_size": 8, "num_channels": 1, "patch_size": 1, "num_stages": 2}
CHANNELS = {
    "image": {
        "modality": "image",
        "model_type": "convnext",
        "config_overrides": {**CONV, "hidden_sizes": [8, 12], "depths": [1, 1]},
    },
    "text": {
        "modality": "text",
        "model_type": "bert",
        "tokenizer_vocab_size": 300,
        "config_overrides": {**SMALL, "intermediate_size": 24},
    },
}


@pytest.fixture(scope="module")
def predicted():
    config = RunConfig.model_validate(
        {
            "name": "run",
            "model": {"task": "multimodal-classification", "channels": CHANNELS},
            "data": {"path": "builtin:named-digits", "max_eval_samples": 24, "max_length": 32},
            "train": {"global_batch_size": 16, "use_cpu": True},
            "dropout": {"modality": {"text": 0.3}},
            "evaluation": {"num_mc_passes": 2, "batch_size": 7},
        }
    )
    raw = load_raw(config)
    modality = modality_of(config)
    processor = modality.load_processor(config, raw.train)
    data = prepare_data(config, raw, processor)
    plan = plan_for(config, data.label_names, processor)
    model = build_model(config, data.label_names, plan, processor)
    torch.nn.init.normal_(model.fusion.missing)
    keyed = KeyedDropout(model, plan, config.seed)
    collate = modality.collator(processor, config)
    passes = MonteCarlo(keyed, 2)
    predictor = Predictor(model, collate, passes, batch_size=7, predicts=modality.predicts,
                          lengths=modality.lengths)  # fmt: skip
    yield config, data.test, predictor, collate
    keyed.release()


def test_a_removed_channel_gives_the_logits_of_rows_that_lack_it(predicted):
    _, rows, predictor, collate = predicted
    found = logits_without(predictor, rows, ("image", "text"))
    for place, name in enumerate(("image", "text")):
        for row in (0, 11, 23):
            batch = collate([rows[row]])
            inputs = {key: value for key, value in batch.items() if "." in key}
            present = torch.tensor([[float(other != place) for other in range(2)]])
            with torch.inference_mode():
                expected = predictor.model(**inputs, present=present).logits
            assert np.allclose(found[name][row], expected[0].numpy(), atol=1e-5)


def test_the_table_is_that_of_scikit_learn(predicted):
    config, rows, predictor, _ = predicted
    prediction, labels = predictor.predict(rows), np.array(rows["labels"][:])
    without = logits_without(predictor, rows, ("image", "text"))
    section = channels_of_test(prediction, without, config)["channels"]
    assert section["rates"] == {"image": 0.0, "text": 0.3}
    whole = torch.softmax(prediction.logits.double(), 1).numpy()
    tables = {"image": without["image"], "text": without["text"]}
    probabilities = {n: torch.softmax(torch.tensor(v), 1).numpy() for n, v in tables.items()}
    for found, own in [(section["all"], whole)] + [
        (section["without"][name], one) for name, one in probabilities.items()
    ]:
        assert found["accuracy"] == accuracy_score(labels, own.argmax(1))
        expected = f1_score(labels, own.argmax(1), average="macro", zero_division=0)
        assert found["f1"] == pytest.approx(expected)
        expected = log_loss(labels, own, labels=range(10))
        assert found["loss"] == pytest.approx(expected, rel=1e-5)


def test_changes_are_paired_row_by_row():
    generator = np.random.default_rng(1)
    labels = generator.integers(3, size=400)
    whole = np.eye(3)[labels] * 0.5 + 0.5 / 3
    wrong = generator.random(400) < 0.25
    logits = np.log(np.eye(3)[np.where(wrong, (labels + 1) % 3, labels)] * 0.5 + 0.5 / 3)
    config = EvaluationConfig(num_bootstrap_resamples=4000)
    section = channel_section(whole, {"text": logits}, labels, {}, config, 3)
    change = section["without"]["text"]["change"]["accuracy"]
    assert change["estimate"] == pytest.approx(-wrong.mean())
    drawn = generator.choice(wrong, size=(4000, 400)).mean(1)
    assert np.allclose(change["interval"], -np.quantile(drawn, [0.975, 0.025]), atol=0.01)


def test_a_model_of_one_input_has_no_such_section(predicted):
    assert channels_of_test(None, {}, predicted[0]) == {}
