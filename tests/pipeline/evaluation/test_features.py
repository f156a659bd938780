"""What the last layer reads, pooled, against one row at a time without padding."""

import pytest
import torch

from pipeline.evaluation.forward import FeatureTap, logits_of, num_bytes, repeated


def hidden_states(keyed, row):
    """What the last layer reads of one row, a vector a token."""
    ids = torch.tensor([row["input_ids"]])
    with torch.no_grad():
        return keyed.model.model(input_ids=ids).last_hidden_state[0].float()


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_classifiers_of_the_last_token_give_its_feature(bind, make_predictor, rows, left):
    keyed = bind("llama", "text-classification", {"insert": {"hidden": 0.1}})
    features, labels = make_predictor(keyed, left=left).features(rows)
    expected = torch.stack([hidden_states(keyed, row)[-1] for row in rows])
    torch.testing.assert_close(features, expected, atol=1e-6, rtol=1e-6)
    assert labels.tolist() == rows["labels"][:]


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_language_models_give_the_mean_over_tokens(bind, make_predictor, rows, left):
    keyed = bind("llama", dropout={"insert": {"hidden": 0.1}})
    features, labels = make_predictor(keyed, left=left).features(rows)
    expected = torch.stack([hidden_states(keyed, row).mean(0) for row in rows])
    torch.testing.assert_close(features, expected, atol=1e-6, rtol=1e-6)
    assert set(labels.tolist()) == {-1}


def test_a_pooling_classifier_gives_its_pooled_feature(bind, make_predictor, rows):
    keyed = bind()
    features = make_predictor(keyed).features(rows.remove_columns("labels"))
    ids = torch.tensor([rows[2]["input_ids"]])
    with torch.no_grad():
        expected = keyed.model.bert(input_ids=ids).pooler_output[0].float()
    torch.testing.assert_close(features[0][2], expected, atol=1e-6, rtol=1e-6)
    assert set(features[1].tolist()) == {-1}


def test_an_adapter_on_the_classifier_is_not_mistaken_for_it(bind, make_predictor, rows):
    adapters = {"r": 3, "target_modules": ["query", "classifier"]}  # r equals the classes
    keyed = bind(dropout={"hidden": 0.1, "adapter": 0.1}, peft=adapters)
    features, _ = make_predictor(keyed).features(rows)
    body = keyed.model.get_base_model().bert
    with torch.no_grad():
        expected = body(input_ids=torch.tensor([rows[0]["input_ids"]])).pooler_output[0].float()
    torch.testing.assert_close(features[0], expected, atol=1e-6, rtol=1e-6)


def test_the_tap_leaves_no_hook_behind(bind):
    model = bind().model
    with FeatureTap(model, has_classes=True):
        logits_of(model, {"input_ids": torch.tensor([[1, 2]])})
        assert model.classifier._forward_pre_hooks
    assert not model.classifier._forward_pre_hooks


def test_an_output_is_repeated_one_copy_after_the_other():
    output = (torch.tensor([[1, 2], [3, 4]]), None)
    copies, nothing = repeated(output, 2)
    assert copies.tolist() == [[1, 2], [3, 4], [1, 2], [3, 4]]
    assert nothing is None
    assert num_bytes(output) == 32
