"""Decisions for whole samples and steps, and the paths that they drop."""

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from pipeline.config.dropout import DropoutConfig
from pipeline.dropout.audit import audited
from pipeline.dropout.context import KeyedDropout
from pipeline.dropout.decisions import drop_paths, dropped, dropped_steps
from pipeline.dropout.key import STEP_ROW_ID, derive_key, signed
from pipeline.dropout.mixing import mixing_notes
from pipeline.dropout.philox import uniform
from pipeline.dropout.plan import Blueprint, make_plan
from pipeline.errors import DropoutError, LeakError

KEYS = torch.tensor([signed(derive_key(5, "train", step, "path", "s", 0)) for step in range(3)])
IDS = torch.arange(400)


def rate(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


def test_a_row_is_dropped_when_its_word_is_below_the_rate():
    found = dropped(KEYS[:1], IDS, rate(0.3)).tolist()
    key = KEYS[0].item() % 2**64
    assert found == [uniform(key, row) < 0.3 for row in IDS.tolist()]
    assert 80 < sum(found) < 160


def test_rows_may_have_keys_and_rates_of_their_own():
    rates = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)
    found = dropped(KEYS, torch.tensor([7, 7, 7]), rates)
    expected = uniform(KEYS[2].item() % 2**64, 7) < 0.5
    assert found.tolist() == [False, True, expected]


def test_a_step_decides_under_the_id_of_steps():
    found = dropped_steps(KEYS, rate(0.5)).tolist()
    assert found == [uniform(key % 2**64, STEP_ROW_ID) < 0.5 for key in KEYS.tolist()]


def test_dropped_paths_are_zero_and_others_are_scaled():
    x = torch.full((4, 3, 2), torch.nan)
    x[2:] = 3.0
    out = drop_paths(x, torch.tensor([True, False]), rate(0.25))
    assert out[:2].eq(0).all()
    assert out[2:].eq(4.0).all()


def test_packed_rows_decide_for_each_token():
    ids = torch.tensor([[1, 1, 2], [3, 4, 4]])
    is_dropped = dropped(KEYS[:1], ids, rate(0.5))
    assert is_dropped.tolist() == dropped(KEYS[:1], ids.ravel(), rate(0.5)).view(2, 3).tolist()
    kept = drop_paths(torch.ones(2, 3, 5), is_dropped, rate(0.5)) > 0
    assert kept.equal(~is_dropped[..., None].expand(2, 3, 5))
    with pytest.raises(DropoutError, match="do not fit a dropped path"):
        drop_paths(torch.ones(2, 4, 5), is_dropped, rate(0.5))


CONFIGS = {
    "convnext": transformers.ConvNextConfig(num_stages=2, hidden_sizes=[8, 12], depths=[2, 2]),
    "dinov2": transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8
    ),
    "beit": transformers.BeitConfig(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=32,
        patch_size=8,
        intermediate_size=40,
        drop_path_rate=0.2,
    ),
    "segformer": transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 2],
        hidden_sizes=[8, 16],
        num_attention_heads=[1, 2],
        sr_ratios=[2, 1],
        patch_sizes=[7, 3],
        strides=[4, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
    ),
}


def blueprint_of(name):
    config = CONFIGS[name]

    def build(rates):
        for field, value in rates.items():
            setattr(config, field, value)
        torch.manual_seed(0)
        return transformers.AutoModelForImageClassification.from_config(config)

    def example(batch_size, length):
        return {"pixel_values": torch.zeros(batch_size, 3, 32, 32)}

    return Blueprint(
        build, example, {"drop_path_rate": config.drop_path_rate}, "", False, lambda model: {}
    )


# The shares of the rate by layer, as each modelling file gives them.
SHARES = {
    "convnext": [1 / 3, 2 / 3, 1],
    "dinov2": [1, 1, 1, 1],
    "beit": [1 / 2, 1 / 2, 1, 1],
    "segformer": [1 / 2, 1 / 2, 1, 1],
}


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_get_their_share_of_the_path_rate(name):
    sites = make_plan(blueprint_of(name), DropoutConfig(path=0.3)).in_force("path")
    assert [site.rate for site in sites] == pytest.approx([0.3 * part for part in SHARES[name]])
    assert {site.variant for site in sites} == {"path"}


def test_without_a_rate_the_models_own_rule_stays():
    own = make_plan(blueprint_of("beit"), DropoutConfig()).in_force("path")
    assert [site.rate for site in own] == pytest.approx([0.1, 0.1, 0.2, 0.2])


def bound(name="convnext"):
    blueprint = blueprint_of(name)
    plan = make_plan(blueprint, DropoutConfig(path=0.6))
    return KeyedDropout(blueprint.build(dict(plan.attributes)), plan, 3)


def test_a_sample_keeps_its_paths_in_any_batch_and_in_monte_carlo_passes():
    keyed, images = bound(), torch.randn(4, 3, 32, 32)
    keyed.model.eval()

    def logits(rows, index=0):
        with keyed.context(purpose="mc", index=index, row_ids=rows + 50), torch.no_grad():
            return keyed.model(images[rows]).logits

    order = torch.tensor([2, 0, 3, 1])
    together = logits(torch.arange(4))
    torch.testing.assert_close(logits(order), together[order])
    torch.testing.assert_close(logits(torch.tensor([3])), together[3:])
    assert not together.equal(logits(torch.arange(4), index=1))


def test_released_paths_draw_natively_and_the_audit_says_so():
    keyed = bound()
    keyed.release()
    with audited(keyed.model) as leaks:
        keyed.model.train()(torch.randn(2, 3, 32, 32))
    assert "convnext.encoder.stages.0.layers.1.drop_path (aten.rand.default)" in map(str, leaks)


def test_a_path_outside_a_context_is_an_error_in_training():
    with pytest.raises(LeakError, match=r"drop_path was asked to drop outside a mask context"):
        bound().model.train()(torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("asked", [{"variant": "token"}, {"rate": 0.1, "learned": True}])
def test_what_is_dropped_whole_takes_no_variant(asked):
    with pytest.raises(DropoutError, match=r"dropout\.path .* whole|dropout\.path takes a rate"):
        make_plan(blueprint_of("beit"), DropoutConfig(path=asked))


def test_layers_that_mix_samples_are_named(config_of):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    names = {module: f"body.{name}" for name, module in model.named_modules()}
    (note,) = mixing_notes(model, names)
    assert note.startswith("Samples mix: body.1, body.2 normalise over the batch in training")
    assert mixing_notes(nn.Sequential(nn.LayerNorm(3)), {}) == []


@pytest.mark.parametrize(("size", "mixes"), [((), True), ((4, 1, 1), False)])
def test_a_contrastive_loss_is_named_and_cosine_attention_is_not(size, mixes):
    model = nn.Module()
    model.logit_scale = nn.Parameter(torch.ones(size))
    assert any("(contrastive)" in note for note in mixing_notes(model, {})) == mixes


def test_a_plan_names_the_balancing_of_experts(config_of):
    from pipeline.model import plan_for

    notes = plan_for(config_of("mixtral", overrides={"output_router_logits": True})).notes
    assert any("balances experts over the batch" in note for note in notes)
    assert plan_for(config_of("mixtral")).notes == ()


def test_decisions_are_uniform():
    share = np.mean(dropped(KEYS[:1], torch.arange(100_000), rate(0.2)).numpy())
    assert abs(share - 0.2) < 3 * np.sqrt(0.2 * 0.8 / 100_000)
