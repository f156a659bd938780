"""Every variant with every schedule on every role: masks locked to samples, at the planned rates.

Masks are compared over micro-batches, order and padding; gradients of some combinations with a
plain loop over single samples, whose masks and rates come from the formulas written here.
"""

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.config.dropout import DropoutConfig
from pipeline.config.schema import RunConfig
from pipeline.dropout.context import KeyedDropout
from pipeline.dropout.key import derive_key
from pipeline.dropout.philox import philox4x32_10
from pipeline.dropout.rates import with_rates
from pipeline.dropout.schedules import rate_at
from pipeline.model import build_model, plan_for
from pipeline.verify.probe import Probe

SEED, STEP, NUM_STEPS, WIDTH, LAYERS, BLOCK = 99, 30, 40, 24, 3, 5
SHAPE = {"hidden_size": WIDTH, "num_attention_heads": 3, "num_hidden_layers": LAYERS}
SHAPE |= {"vocab_size": 61, "intermediate_size": 40, "max_position_embeddings": 40}
KINDS = {
    "bert": ("text-classification", SHAPE, ("embedding", "hidden", "head", "attention")),
    "llama": ("text-generation", SHAPE | {"num_key_value_heads": 1}, ("embedding", "hidden")),
}
VARIANTS = ("element", "channel", "token", "block")
DEPTHS = ("constant", "linear", "early", "late")
PROGRESSES = ("constant", "linear", "curriculum")


def dropout_of(kind: str, variant: str, depth: str, progress: str) -> dict[str, Any]:
    given = {"rate": 0.4, "variant": variant, "depth": depth, "progress": progress, "gamma": 3.0}
    if variant == "block":
        given["block_size"] = BLOCK
    if kind == "llama":
        return {"attention": 0, "insert": dict.fromkeys(("embedding", "hidden"), given)}
    masked = {name: value for name, value in given.items() if name not in ("variant", "block_size")}
    return dict.fromkeys(("embedding", "hidden", "head"), given) | {"attention": masked}


@pytest.fixture(scope="module", params=KINDS)
def small(request):
    """A model, and its plan with every site alive."""
    task, shape, _ = KINDS[request.param]
    dropout = dropout_of(request.param, "element", "constant", "constant")
    config = RunConfig(
        name="every",
        seed=SEED,
        model={"task": task, "model_type": request.param, "config_overrides": shape},
        data={"path": "unused", "max_length": 32},
        dropout=dropout,
    )
    plan = plan_for(config)
    return request.param, build_model(config, None, plan).double().train(), plan


def planned(kind: str, plan, *combination: str):
    given = DropoutConfig.model_validate(dropout_of(kind, *combination))
    return replace(plan, sites=with_rates(plan.sites, given), num_steps=NUM_STEPS)


def rows() -> list[list[int]]:
    generator = np.random.default_rng(3)
    return [generator.integers(2, 61, size=5 + place % 4).tolist() for place in range(8)]


def batch_of(places: list[int], left: bool, padding: int = 0) -> dict[str, torch.Tensor]:
    length = max(len(rows()[place]) for place in places) + padding
    ids, attended = (torch.zeros(len(places), length, dtype=torch.long) for _ in range(2))
    for at, place in enumerate(places):
        size = len(rows()[place])
        where = slice(length - size, length) if left else slice(0, size)
        ids[at, where], attended[at, where] = torch.tensor(rows()[place]), 1
    return {"input_ids": ids, "attention_mask": attended}


def masks(model, plan, parts: list[list[int]], left: bool, padding: int = 0) -> Any:
    """The digests of every site's masks by sample."""
    keyed, probe = KeyedDropout(model, plan, SEED), Probe()
    keyed.observer = probe.observe
    for places in parts:
        ids = torch.tensor([1000 + place for place in places])
        with torch.no_grad(), keyed.context(purpose="train", index=STEP, row_ids=ids):
            model(**batch_of(places, left, padding))
    keyed.release()
    assert not probe.changed
    return probe.masks


ALL = list(itertools.product(VARIANTS, DEPTHS, PROGRESSES))


@pytest.mark.parametrize("combination", ALL, ids="-".join)
def test_masks_do_not_depend_on_batch_order_or_padding(small, combination):
    kind, model, plan = small
    plan = planned(kind, plan, *combination)
    together = masks(model, plan, [list(range(8))], left=False)
    apart = masks(model, plan, [[5, 2], [7, 0, 1], [4], [6, 3]], left=kind == "llama", padding=3)
    assert together == apart
    sites = together[str(STEP)]
    assert len(sites) == len(plan.in_force())
    assert all(len(digests) == 8 for digests in sites.values())


def decisions(site, batch: int, length: int) -> int:
    """How many values of a mask are drawn by themselves."""
    per_token = {"element": WIDTH, "token": 1, "block": math.ceil(WIDTH / BLOCK)}
    if site.variant == "attention":
        return batch * 3 * length * length
    if site.variant == "channel":
        return batch * WIDTH
    positions = 1 if site.role == "head" else length
    return batch * positions * per_token[site.variant]


@pytest.mark.parametrize("combination", ALL, ids="-".join)
def test_every_site_keeps_the_planned_share(small, combination):
    kind, model, plan = small
    plan = planned(kind, plan, *combination)
    keyed, seen = KeyedDropout(model, plan, SEED), {}

    def observe(mask, active, key, x):
        kept = mask.apply(active, key, torch.ones_like(x)) != 0
        seen[mask.site] = float(kept.double().mean())

    keyed.observer = observe
    batch = {"input_ids": torch.full((64, 12), 5)}
    with torch.no_grad(), keyed.context(purpose="train", index=STEP, row_ids=torch.arange(64)):
        model(**batch)
    keyed.release()
    assert len(seen) == len(plan.in_force()) > 0
    for site, share in seen.items():
        rate = rate_at(site, None, STEP / NUM_STEPS)
        sigma = math.sqrt(rate * (1 - rate) / decisions(site, 64, 12))
        assert share == pytest.approx(1 - rate, abs=4 * sigma + 1e-5), site


# -- gradients against a plain loop ----------------------------------------------------------------


def rate_by_hand(depth: str, progress: str, site: str) -> float:
    rate, done = 0.4, STEP / NUM_STEPS
    numbers = [int(part) for part in site.split(".") if part.isdigit()]
    if numbers:
        layer = numbers[0]
        shares = {"linear": layer / 2, "early": layer == 0, "late": layer == 2}
        rate *= shares.get(depth, 1)
    return rate * {"linear": done, "curriculum": 1 - math.exp(-3 * done)}.get(progress, 1)


def mask_by_hand(site: str, variant: str, rate: float, sample: int, x: torch.Tensor):
    key = derive_key(SEED, "train", STEP, variant, site, 0)
    shape = x.shape[1:] if x.dim() == 3 else (1, x.shape[-1])
    kept = np.empty(shape)
    for position in range(shape[0]):
        for feature in range(WIDTH):
            lane = {"element": feature, "channel": feature, "token": 0, "block": feature // BLOCK}
            at = 0xFFFFFFFF if variant == "channel" else position
            where = lane[variant]
            words = philox4x32_10(key, np.array([where // 8, at, sample, 0], dtype=np.uint32))
            drawn = int(words[where % 8 // 2]) >> 16 * (where % 2) & 0xFFFF
            kept[position, feature] = drawn >= round(65536 * rate)
    scale = np.float32(65536 / (65536 - round(65536 * rate)))
    return torch.from_numpy(kept * np.float64(scale)).view(shape if x.dim() == 3 else shape[1:])


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    "combination",
    [
        ("block", "linear", "curriculum"),
        ("token", "late", "linear"),
        ("channel", "early", "constant"),
    ],
    ids="-".join,
)
def test_gradients_equal_a_plain_loop(small, combination):
    kind, model, plan = small
    variant, depth, progress = combination
    plan = planned(kind, plan, *combination)
    still = tuple(
        replace(s, in_force=False, rate=0.0) if s.role == "attention" else s for s in plan.sites
    )
    keyed = KeyedDropout(model, replace(plan, sites=still), SEED)
    left = kind == "llama"
    for places in ([0, 1, 2, 3], [4, 5, 6, 7]):
        ids, batch = torch.tensor(places) + 1000, batch_of(places, left)
        with keyed.context(purpose="train", index=STEP, row_ids=ids):
            logits = model(**batch).logits
            if logits.dim() == 3:
                logits = logits * batch["attention_mask"][..., None]
            logits.square().sum().backward()
    keyed.release()
    found = gradients(model)

    sample = 0
    handles = []
    for site in plan.in_force():
        if site.role != "attention":
            rate = rate_by_hand(depth, progress, site.site)

            def hook(module, args, out, name=site.site, rate=rate):
                x = args[0] if isinstance(module, nn.Dropout) else out
                x = x[0] if isinstance(x, tuple) else x
                masked = x * mask_by_hand(name, variant, rate, 1000 + sample, x)
                return (masked, *out[1:]) if isinstance(out, tuple) else masked

            handles.append(model.get_submodule(site.site).register_forward_hook(hook))
    model.eval()
    for sample in range(8):  # noqa: B007 (the hooks read it)
        model(input_ids=torch.tensor([rows()[sample]])).logits.square().sum().backward()
    for handle in handles:
        handle.remove()
    model.train()
    wanted = gradients(model)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        largest = float(wanted[name].abs().max())  # norms and rotations are float32 inside
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-6 * largest + 1e-12)
