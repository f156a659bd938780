"""The plan: every site of every family, its role, its rate, and all that stands against it."""

import json

import pytest
import torch

from pipeline.dropout import trace
from pipeline.dropout.plan import DropoutPlan
from pipeline.errors import DropoutError
from pipeline.model import plan_for

LETTERS = {"embedding": "E", "hidden": "H", "activation": "A", "attention": "P", "head": "C"}
LETTERS["layer"] = "L"

# By hand, from the modelling files: `site#call role`, in the order of the forward pass.
SITES = {
    "bert": """bert.embeddings.dropout#0 E, bert.encoder.layer.0.attention.self#0 P,
        bert.encoder.layer.0.attention.output.dropout#0 H, bert.encoder.layer.0.output.dropout#0 H,
        dropout#0 C""",
    "roberta": """roberta.embeddings.dropout#0 E, roberta.encoder.layer.0.attention.self#0 P,
        roberta.encoder.layer.0.attention.output.dropout#0 H,
        roberta.encoder.layer.0.output.dropout#0 H,
        classifier.dropout#0 C, classifier.dropout#1 C""",
    "distilbert": """distilbert.embeddings.dropout#0 E,
        distilbert.transformer.layer.0.attention#0 P,
        distilbert.transformer.layer.0.ffn.dropout#0 H, dropout#0 C""",
    "electra": """electra.embeddings.dropout#0 E, electra.encoder.layer.0.attention.self#0 P,
        electra.encoder.layer.0.attention.output.dropout#0 H,
        electra.encoder.layer.0.output.dropout#0 H,
        classifier.dropout#0 C, classifier.dropout#1 C""",
    "albert": """albert.embeddings.dropout#0 E,
        albert.encoder.albert_layer_groups.0.albert_layers.0.attention#0 P,
        albert.encoder.albert_layer_groups.0.albert_layers.0.attention.output_dropout#0 H,
        albert.encoder.albert_layer_groups.0.albert_layers.0.attention#1 P,
        albert.encoder.albert_layer_groups.0.albert_layers.0.attention.output_dropout#1 H,
        dropout#0 C""",
    "modernbert": """model.embeddings.drop#0 E, model.layers.0.attn#0 P,
        model.layers.0.attn.out_drop#0 H, model.layers.0.mlp.drop#0 A, drop#0 C""",
    "gpt2": """transformer.drop#0 E, transformer.h.0.attn#0 P,
        transformer.h.0.attn.resid_dropout#0 H, transformer.h.0.mlp.dropout#0 H""",
    "llama": "model.layers.0.self_attn#0 P",
    "qwen3": "model.layers.0.self_attn#0 P",
    "mistral": "model.layers.0.self_attn#0 P",
    "gemma3_text": "model.layers.0.self_attn#0 P",
    "opt": """model.decoder.layers.0#0 L, model.decoder.layers.0.self_attn#0 P,
        model.decoder.layers.0#0 H, model.decoder.layers.0#1 H""",
    "bart": """model.encoder#0 E, model.encoder.layers.0#0 L,
        model.encoder.layers.0.self_attn#0 P,
        model.encoder.layers.0#0 H, model.encoder.layers.0#1 A, model.encoder.layers.0#2 H,
        model.decoder#0 E, model.decoder.layers.0#0 L,
        model.decoder.layers.0.self_attn#0 P, model.decoder.layers.0#0 H,
        model.decoder.layers.0.encoder_attn#0 P, model.decoder.layers.0#1 H,
        model.decoder.layers.0#2 A, model.decoder.layers.0#3 H,
        classification_head.dropout#0 C, classification_head.dropout#1 C""",
    "t5": """transformer.encoder.dropout#0 E,
        transformer.encoder.block.0.layer.0.SelfAttention#0 P,
        transformer.encoder.block.0.layer.0.dropout#0 H,
        transformer.encoder.block.0.layer.1.DenseReluDense.dropout#0 A,
        transformer.encoder.block.0.layer.1.dropout#0 H, transformer.encoder.dropout#1 H,
        transformer.decoder.dropout#0 E,
        transformer.decoder.block.0.layer.0.SelfAttention#0 P,
        transformer.decoder.block.0.layer.0.dropout#0 H,
        transformer.decoder.block.0.layer.1.EncDecAttention#0 P,
        transformer.decoder.block.0.layer.1.dropout#0 H,
        transformer.decoder.block.0.layer.2.DenseReluDense.dropout#0 A,
        transformer.decoder.block.0.layer.2.dropout#0 H, transformer.decoder.dropout#1 H,
        classification_head.dropout#0 C, classification_head.dropout#1 C""",
    "gpt_neox": """gpt_neox.emb_dropout#0 E, gpt_neox.layers.0.attention#0 P,
        gpt_neox.layers.0.post_attention_dropout#0 H, gpt_neox.layers.0.post_mlp_dropout#0 H""",
    "phi3": """model.layers.0.self_attn#0 P, model.layers.0.resid_attn_dropout#0 H,
        model.layers.0.resid_mlp_dropout#0 H""",
    # `dropout_add`, a function of three tensors, is called by a layer.
    "bloom": """transformer.h.0.self_attention.attention_dropout#0 P,
        transformer.h.0.self_attention#0 H, transformer.h.0.mlp#0 H""",
    "falcon": "transformer.h.0#0 H",
    # Older attention: probabilities as [samples x heads, queries, keys].
    "xglm": """model#0 E, model.layers.0#0 L, model.layers.0.self_attn#0 P,
        model.layers.0#0 H, model.layers.0#1 A, model.layers.0#2 H""",
}
INSERTED = {"insert": {"embedding": 0.1, "hidden": 0.2}}


@pytest.mark.parametrize("model_type", SITES)
def test_the_sites_of_a_family_are_those_of_its_modelling_file(config_of, model_type):
    plan = plan_for(config_of(model_type))
    found = [f"{site.site}#{site.call} {LETTERS[site.role]}" for site in plan.sites]
    assert found == [" ".join(entry.split()) for entry in SITES[model_type].split(",")]


@pytest.mark.parametrize("model_type", SITES)
def test_every_family_trains_at_rates_by_role(bind, tokens, model_type):
    wanted = {r for r, letter in LETTERS.items() if f" {letter}" in SITES[model_type]}
    bound = bind(model_type, dict.fromkeys(wanted, 0.25))
    assert {(site.role, site.rate) for site in bound.plan.in_force()} == {(r, 0.25) for r in wanted}
    batch = tokens()
    batch["input_ids"][:, -1] = bound.model.config.eos_token_id if model_type == "t5" else 5
    if model_type == "bart":
        batch["input_ids"][:, -1] = bound.model.config.eos_token_id
    first, again, other = (bound.logits(index=i, **batch) for i in (0, 0, 1))
    assert first.equal(again)
    assert not first.equal(other)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mistral", "gemma3_text"])
def test_sites_are_inserted_where_a_model_has_none(config_of, model_type):
    plan = plan_for(config_of(model_type, INSERTED))
    assert [(s.site, s.role, s.rate, s.door) for s in plan.in_force()] == [
        ("model.embed_tokens", "embedding", 0.1, "inserted"),
        ("model.layers.0.self_attn", "hidden", 0.2, "inserted"),
        ("model.layers.0.mlp", "hidden", 0.2, "inserted"),
    ]


def test_a_role_left_out_keeps_its_rate_and_zero_switches_it_off(config_of):
    plan = plan_for(config_of("bert", {"hidden": 0, "head": 0.5}))
    rates = {site.role: (site.rate, site.in_force, site.reason) for site in plan.sites}
    assert rates["embedding"] == (0.1, True, "")
    assert rates["hidden"] == (0.0, False, "rate 0")
    assert rates["head"] == (0.5, True, "")


def test_the_last_override_that_matches_wins(config_of):
    overrides = {"*.layer.0.*": 0.3, "*.attention.output.*": 0.4, "classifier.dropout#1": 0.0}
    plan = plan_for(config_of("roberta", {"overrides": overrides, "head": 0.5}))
    rates = {f"{s.site.removeprefix('roberta.')}#{s.call}": s.rate for s in plan.sites}
    assert rates == {
        "embeddings.dropout#0": 0.1,
        "encoder.layer.0.attention.self#0": 0.3,
        "encoder.layer.0.attention.output.dropout#0": 0.4,
        "encoder.layer.0.output.dropout#0": 0.3,
        "classifier.dropout#0": 0.5,
        "classifier.dropout#1": 0.0,
    }
    assert dict(plan.attributes)["classifier_dropout"] == 0.5  # so that the first one is built


def test_variants_are_given_by_role(config_of):
    given = {"hidden": {"variant": "token"}, "head": {"variant": "channel"}}
    plan = plan_for(config_of("bert", given))
    variants = {site.role: site.variant for site in plan.sites}
    assert variants == {
        "embedding": "element",
        "attention": "attention",
        "hidden": "token",
        "head": "channel",
    }


ERRORS = {
    "a role that the model lacks": (
        "llama",
        {"hidden": 0.1},
        {},
        r"hidden is 0\.1, but .* no hidden dropout \(it has: attention\); .* use dropout\.insert\.",
    ),
    "an insertion without modules": (
        "gpt2",
        {"insert": {"embedding": 0.1}},
        {},
        r"insert\.embedding is 0\.1, but this model has no modules to put it on",
    ),
    "an override that matches nothing": (
        "bert",
        {"overrides": {"bert.nothing*": 0.1}},
        {},
        r"pattern 'bert\.nothing\*' matches no site",
    ),
    "fused attention": (
        "bert",
        {"attention": 0.1},
        {"attn_implementation": "sdpa"},
        r"attention dropout is 0\.1: model\.attn_implementation is sdpa, .* use `attn_impl",
    ),
    "a wrong variant": ("bert", {"attention": {"variant": "token"}}, {}, "masked one by one"),
    "time first": ("xlnet", {}, {}, r"transformer\.dropout#0 .* \(time-major\)"),
    "features before positions": ("squeezebert", {}, {}, "the sequence, not features"),
    "local attention": ("longformer", {}, {}, r"not \(samples, heads, queries, keys\)"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_cannot_be_in_force_is_an_error(config_of, case):
    model_type, dropout, model, message = ERRORS[case]
    with pytest.raises(DropoutError, match=message):
        plan_for(config_of(model_type, dropout, model=model))


def test_all_problems_are_listed_at_once(config_of):
    dropout = {"activation": 0.1, "overrides": {"nothing": 0.1, "neither": 0.2}}
    with pytest.raises(DropoutError) as error:
        plan_for(config_of("bert", dropout))
    assert len(str(error.value).splitlines()) == 4


def test_a_refused_site_runs_once_its_rate_is_zero(bind, tokens):
    bound = bind("squeezebert", {"hidden": 0, "embedding": 0, "attention": 0, "head": 0.2})
    first, other = (bound.logits(index=i, **tokens()) for i in (0, 1))
    assert not first.equal(other)


def test_a_mask_that_samples_share_is_keyed_by_the_step(bind, tokens):
    dropout = {"overrides": {"*": 0, "*.pos_dropout": 0.5}}
    bound = bind("deberta-v2", dropout, overrides={"pos_att_type": ["p2c", "c2p"]})
    (shared,) = bound.plan.in_force()
    assert (shared.layout, shared.shape) == ("shared", (16, 24))
    batch = tokens()
    alone = {name: rows[:1] for name, rows in batch.items()}
    together, other = bound.logits(**batch), bound.logits(index=1, **batch)
    torch.testing.assert_close(bound.logits(row_ids=[5], **alone), together[:1])
    assert not together.equal(other)


def test_fused_attention_is_welcome_without_attention_dropout(bind, tokens):
    bound = bind("bert", {"attention": 0}, model={"attn_implementation": "sdpa"})
    assert bound.model.config._attn_implementation == "sdpa"
    assert bound.logits(**tokens()).shape == (3, 2)


def test_randomness_past_the_doors_is_an_error_by_name_unless_tolerated(config_of, monkeypatch):
    model = {"overrides": {"router_jitter_noise": 0.1}}
    assert plan_for(config_of("mixtral", **model)).in_force("jitter")
    monkeypatch.setattr(trace, "open_jitter", lambda names, draw: lambda: None)
    with pytest.raises(
        DropoutError, match=r"outside .*layers\.0\.mlp \(aten\.uni.*config_overrides"
    ):
        plan_for(config_of("mixtral", **model))
    plan = plan_for(config_of("mixtral", {"strict": False}, **model))
    assert "randomness outside the plan: model.layers.0.mlp (aten.uniform_.default)" in plan.notes


def test_a_plan_comes_back_from_json_as_it_went(config_of):
    plan = plan_for(config_of("gpt2", {"hidden": 0.3}))
    again = DropoutPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.digest == plan.to_json()["digest"]


def test_the_digest_changes_with_what_changes_masks_only(config_of):
    def digest(**dropout) -> str:
        return plan_for(config_of("gpt2", dropout)).digest

    assert digest(hidden=0.1) == digest()
    assert len({digest(), digest(hidden=0.3), digest(hidden={"variant": "token"})}) == 3


def test_the_table_names_sites_in_force_first(config_of):
    table = plan_for(config_of("bert", {"embedding": 0})).table().splitlines()
    assert table[0].split()[0] == "site#call"
    assert table[1].startswith("bert.encoder.layer.0.attention.self#0")
    assert table[5].split() == ["bert.embeddings.dropout#0", "embedding", "element", "0"] + [
        "module",
        "no:",
        "rate",
        "0",
    ]
    assert table[-1].startswith("4 of 5 sites in force, digest ")


def test_a_plan_needs_no_weights(config_of):
    size = {"overrides": {"n_embd": 12288, "n_head": 96, "n_layer": 2, "vocab_size": 50257}}
    assert len(plan_for(config_of("gpt2", **size)).sites) == 7
