"""Every kind of image model keeps the contract: sites by hand, locked masks, the same weights back.

The models are small and made from configurations; their images are noise.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.config.schema import RunConfig
from pipeline.dropout.audit import audited
from pipeline.dropout.context import KeyedDropout
from pipeline.dropout.decisions import dropped
from pipeline.dropout.key import derive_key, signed
from pipeline.evaluation.mc_dropout import MonteCarlo
from pipeline.model import build_model, load_trained, plan_for

SEED, LABELS = 1234567, ("a", "b", "c")
IDS = torch.arange(16) * 37 + 1000
IMAGES = torch.from_numpy(np.random.default_rng(5).normal(size=(16, 1, 8, 8)))


@dataclass(frozen=True)
class Family:
    """A small model and, by hand, the sites it calls in order: (site, call, variant, rate)."""

    model_type: str
    overrides: dict[str, Any]
    dropout: dict[str, Any]
    sites: list[tuple[str, int, str, float]]


GREY = {"image_size": 8, "num_channels": 1}
PLAIN = {**GREY, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2,
         "num_attention_heads": 2}  # fmt: skip


def vit_sites(name: str) -> list[tuple[str, int, str, float]]:
    sites = [
        (f"{name}.embeddings.patch_embeddings", 0, "token", 0.25),
        (f"{name}.embeddings.dropout", 0, "element", 0.05),
    ]
    for layer in range(2):
        sites += [
            (f"{name}.layers.{layer}.attention", 0, "attention", 0.2),
            (f"{name}.layers.{layer}.dropout", 0, "element", 0.1),
            (f"{name}.layers.{layer}.dropout", 1, "element", 0.1),
        ]
    return [*sites, (f"{name}.layernorm", 0, "element", 0.3)]


def dinov2_sites() -> list[tuple[str, int, str, float]]:
    sites = [
        ("dinov2.embeddings.patch_embeddings", 0, "token", 0.25),
        ("dinov2.embeddings.dropout", 0, "element", 0.05),
    ]
    for layer in range(2):
        at = f"dinov2.encoder.layer.{layer}"
        sites += [
            (f"{at}.attention", 0, "attention", 0.2),
            (f"{at}.drop_path", 0, "path", 0.3),
            (f"{at}.drop_path", 1, "path", 0.3),
        ]
    return [*sites, ("dinov2.layernorm", 0, "element", 0.3)]


def swin_sites() -> list[tuple[str, int, str, float]]:
    def block(stage: int, place: int, path: float) -> list[tuple[str, int, str, float]]:
        at = f"swin.encoder.layers.{stage}.blocks.{place}"
        drop_path = [(f"{at}.drop_path", 0, "path", path)] if path else []
        return [
            (f"{at}.attention", 0, "attention", 0.2),
            (f"{at}.dropout", 0, "element", 0.1),
            *drop_path,
            (f"{at}.dropout", 1, "element", 0.1),
        ]

    return [
        ("swin.embeddings.patch_embeddings", 0, "token", 0.25),
        ("swin.embeddings.dropout", 0, "element", 0.05),
        *block(0, 0, 0.0),
        *block(0, 1, 0.15),
        *block(1, 0, 0.3),
        ("swin.layernorm", 0, "element", 0.3),
    ]


CONVNEXT_SITES = [
    ("convnext.encoder.stages.0.layers.1.drop_path", 0, "path", 0.15),
    ("convnext.encoder.stages.1.layers.0.drop_path", 0, "path", 0.3),
    ("convnext.layernorm", 0, "element", 0.3),
]
BIT_SITES = [
    ("bit.encoder.stages.1.layers.0.drop_path", 0, "path", 0.3),
    ("bit.pooler", 0, "element", 0.3),
]
INSERTED = {"patch": 0.25, "head": 0.3}
OF_VIT = {"embedding": 0.05, "hidden": 0.1, "attention": 0.2, "insert": INSERTED}
FAMILIES = {
    "vit": Family("vit", {**PLAIN, "intermediate_size": 32}, OF_VIT, vit_sites("vit")),
    "deit": Family("deit", {**PLAIN, "intermediate_size": 32}, OF_VIT, vit_sites("deit")),
    "dinov2": Family(
        "dinov2",
        {**PLAIN, "mlp_ratio": 2},
        {"embedding": 0.05, "attention": 0.2, "path": 0.3, "insert": INSERTED},
        dinov2_sites(),
    ),
    "swin": Family(
        "swin",
        {**GREY, "patch_size": 1, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2],
         "window_size": 4, "mlp_ratio": 2},
        {"path": 0.3, **OF_VIT},
        swin_sites(),
    ),
    "convnext": Family(
        "convnext",
        {**GREY, "patch_size": 2, "hidden_sizes": [8, 16], "depths": [2, 1], "num_stages": 2,
         "layer_scale_init_value": 1.0},
        {"path": 0.3, "insert": {"head": 0.3}},
        CONVNEXT_SITES,
    ),
    "bit": Family(
        "bit",
        {"num_channels": 1, "embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1],
         "num_groups": 4},
        {"path": 0.3, "insert": {"head": 0.3}},
        BIT_SITES,
    ),
}  # fmt: skip


@dataclass
class Made:
    """One family's model with its plan."""

    family: Family
    config: RunConfig
    model: nn.Module
    keyed: KeyedDropout


@pytest.fixture(params=FAMILIES, scope="module")
def made(request: pytest.FixtureRequest) -> Made:
    family = FAMILIES[request.param]
    config = config_of(family, family.dropout)
    plan = plan_for(config, LABELS)
    model = build_model(config, LABELS, plan).double()
    with torch.no_grad():  # initial weights are so small that no mask would show
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return Made(family, config, model, KeyedDropout(model, plan, SEED))


def config_of(family: Family, dropout: dict[str, Any]) -> RunConfig:
    return RunConfig(
        name="contract",
        seed=SEED,
        model={
            "task": "image-classification",
            "model_type": family.model_type,
            "config_overrides": family.overrides,
        },
        data={"path": "unused"},
        dropout=dropout,
    )


def logits_at(made: Made, places: torch.Tensor, step: int = 3) -> torch.Tensor:
    with made.keyed.context(purpose="train", index=step, row_ids=IDS[places]):
        found: torch.Tensor = made.model(pixel_values=IMAGES[places]).logits
        return found


def gradients(made: Made, parts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    made.model.train()
    made.model.zero_grad()
    for places in parts:
        with made.keyed.context(purpose="train", index=3, row_ids=IDS[places]):
            logits = made.model(pixel_values=IMAGES[places]).logits
            loss = nn.functional.cross_entropy(logits, IDS[places] % 3, reduction="sum")
            (loss / len(IDS)).backward()
    return {n: p.grad.clone() for n, p in made.model.named_parameters() if p.grad is not None}


def test_plan_is_the_hand_made_list_and_nothing_leaks(made):
    plan = made.keyed.plan
    live = [(site.site, site.call, site.variant, site.rate) for site in plan.in_force()]
    assert live == made.family.sites
    assert not any("outside the plan" in note for note in plan.notes)
    with audited(made.model) as leaks:
        gradients(made, [torch.arange(16)])
    assert leaks == []


def test_a_sample_has_the_same_masks_in_any_micro_batch_and_order(made):
    made.model.train()
    with torch.no_grad():
        whole = logits_at(made, torch.arange(16))
        alone = torch.cat([logits_at(made, torch.tensor([place])) for place in range(16)])
        turned = logits_at(made, torch.arange(15, -1, -1)).flip(0)
        other_step = logits_at(made, torch.arange(16), step=4)
    assert torch.allclose(alone, whole, atol=1e-9)
    assert torch.allclose(turned, whole, atol=1e-9)
    assert not torch.allclose(other_step, whole, atol=1e-3)


def test_gradients_of_sixteen_are_those_of_four_times_four(made):
    places = torch.arange(16)
    whole, split = gradients(made, [places]), gradients(made, list(places.split(4)))
    assert whole.keys() == split.keys()
    for name, gradient in whole.items():
        assert torch.allclose(split[name], gradient, rtol=1e-6, atol=1e-9), name


def test_a_saved_model_comes_back_with_the_same_logits(made, tmp_path):
    model = build_model(made.config, LABELS, made.keyed.plan).eval()
    model.save_pretrained(tmp_path)
    again = load_trained(tmp_path, made.config, LABELS, made.keyed.plan).eval()
    x = IMAGES.float()
    with torch.no_grad():
        assert torch.equal(again(pixel_values=x).logits, model(pixel_values=x).logits)


def test_monte_carlo_passes_differ_by_dropout_alone(made):
    made.model.eval()
    passes = MonteCarlo(made.keyed, num_passes=4)
    with torch.no_grad():
        first = torch.stack(list(passes.passes({"pixel_values": IMAGES}, IDS)))
        again = torch.stack(list(passes.passes({"pixel_values": IMAGES}, IDS)))
        plain = [made.model(pixel_values=IMAGES).logits for _ in range(2)]
    assert torch.equal(first, again)
    assert (first.var(dim=0) > 0).any(dim=1).all()
    assert torch.equal(plain[0], plain[1])


def test_dropped_paths_are_those_of_the_key(monkeypatch):
    """DropPath by hand: a sample's block is left out, or its path divided by 1 - rate."""
    family = FAMILIES["convnext"]
    config = config_of(family, {"path": 0.3})
    plan = plan_for(config, LABELS)
    model = build_model(config, LABELS, plan).double().train()
    sites = {name: module for name, module in model.named_modules() if name.endswith("drop_path")}
    rates = {site: rate for site, _, variant, rate in family.sites if variant == "path"}
    for name, module in sites.items():

        def by_hand(x, name=name):
            key = torch.tensor([signed(derive_key(SEED, "train", 3, "path", name, 0))])
            rate = torch.tensor([rates[name]], dtype=torch.float64)
            kept = ~dropped(key, IDS, rate)
            return x * (kept / (1 - rate))[:, None, None, None]

        if name in rates:
            monkeypatch.setattr(module, "forward", by_hand)
    with torch.no_grad():
        expected = model(pixel_values=IMAGES).logits
        monkeypatch.undo()
        keyed = KeyedDropout(model, plan, SEED)
        with keyed.context(purpose="train", index=3, row_ids=IDS):
            found = model(pixel_values=IMAGES).logits
    assert torch.allclose(found, expected, atol=1e-12)
