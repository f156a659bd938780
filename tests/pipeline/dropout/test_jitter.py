"""A router's jitter and LeViT's paths: the model's own code, given keyed numbers, is the judge."""

from collections import deque

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from pipeline.config.dropout import DropoutConfig
from pipeline.dropout.context import KeyedDropout
from pipeline.dropout.jitter import open_jitter
from pipeline.dropout.key import derive_key
from pipeline.dropout.philox import lanes, philox_words
from pipeline.dropout.plan import Blueprint, make_plan
from pipeline.errors import DropoutError, LeakError

SEED, EPS, IDS, LENGTHS = 77, 0.3, [1000, 1037, 5], [7, 4, 9]
SIZES = {"vocab_size": 61, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 24}
SIZES |= {"intermediate_size": 40, "num_key_value_heads": 2, "head_dim": 8}
SIZES |= {"num_local_experts": 3, "num_experts_per_tok": 2, "pad_token_id": 0}
SWITCH = {"d_model": 24, "d_kv": 8, "d_ff": 40, "num_heads": 3, "num_layers": 2, "vocab_size": 61}
SWITCH |= {"num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_experts": 3}
SWITCH |= {"num_sparse_decoder_layers": 1, "expert_capacity": 99, "decoder_start_token_id": 0}
DBRX = {"d_model": 24, "n_heads": 4, "n_layers": 2, "max_seq_len": 32, "vocab_size": 61}
DBRX |= {
    "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    "resid_pdrop": 0.0,
    "emb_pdrop": 0.0,
}
FFN = {"ffn_hidden_size": 40, "moe_num_experts": 3, "moe_top_k": 2}

MIXTRAL_SITES = [f"model.layers.{layer}.mlp" for layer in (0, 1)]
DBRX_SITES = [f"transformer.blocks.{layer}.ffn.router" for layer in (0, 1)]
SWITCH_SITES = [
    f"{part}.block.1.layer.{n}.mlp.router" for part, n in (("encoder", 1), ("decoder", 2))
]
KINDS = {
    "MixtralForCausalLM": (SIZES | {"router_jitter_noise": EPS}, MIXTRAL_SITES),
    "MiniMaxM2ForCausalLM": (SIZES | {"router_jitter_noise": EPS}, MIXTRAL_SITES),
    "DbrxForCausalLM": (DBRX | {"ffn_config": FFN | {"moe_jitter_eps": EPS}}, DBRX_SITES),
    "SwitchTransformersForConditionalGeneration": (
        SWITCH | {"router_jitter_noise": EPS, "dropout_rate": 0.0},
        SWITCH_SITES,
    ),
}


def build(name: str, config: dict) -> torch.nn.Module:
    config_class = getattr(transformers, name.partition("For")[0] + "Config")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = config_class(**config)
        return getattr(transformers, name)._from_config(built, attn_implementation="eager")


def plan_of(name: str, config: dict):
    def example(batch: int, length: int):
        ids = torch.ones(batch, length, dtype=torch.long)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return inputs | ({"decoder_input_ids": ids} if name.startswith("Switch") else {})

    blueprint = Blueprint(lambda rates: build(name, config), example, {}, "", False, lambda m: {})
    return make_plan(blueprint, DropoutConfig())


def batch_of(rows: list[int]) -> dict[str, Tensor]:
    length = max(LENGTHS[row] for row in rows)
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length)
    for place, row in enumerate(rows):
        generator = torch.Generator().manual_seed(row)
        ids[place, : LENGTHS[row]] = torch.randint(2, 61, (LENGTHS[row],), generator=generator)
        mask[place, : LENGTHS[row]] = 1
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def noise_by_hand(site: str, row: int, shape: tuple[int, int]) -> Tensor:
    """`[T, D]` in (1 - eps, 1 + eps), from the specification."""
    key = derive_key(SEED, "augment", 3, "jitter", site, 0)
    words = philox_words(key, np.arange(shape[1] // 8)[None], np.arange(shape[0])[:, None], row)
    drawn = lanes(words).reshape(shape)
    return torch.from_numpy(1 + EPS * ((2.0 * drawn + 1) / 65536 - 1)).float()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(params=KINDS)
def kind(request):
    return (request.param, *KINDS[request.param])


def by_hand(kind, monkeypatch) -> dict[str, Tensor]:
    """Sample by sample, unpadded: the model's own draw, `uniform_`, is given keyed numbers."""
    name, config, sites = kind
    model = build(name, config).train()
    for row, sample in enumerate(IDS):
        left = deque(sites)

        def uniform(x: Tensor, low: float, high: float, left=left, sample=sample) -> Tensor:
            assert (low, high) == (1 - EPS, 1 + EPS)
            return x.copy_(noise_by_hand(left.popleft(), sample, x.shape[-2:]).view(x.shape))

        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "uniform_", uniform)
            loss = model(**batch_of([row])).loss * (LENGTHS[row] - ("Causal" in name))
        loss.backward()
        assert not left
    return gradients(model)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_jitter_in_a_padded_batch_is_that_of_each_sample_alone(kind, monkeypatch, checkpointing):
    name, config, sites = kind
    plan = plan_of(name, config)
    assert [(s.site, s.label, s.rate) for s in plan.in_force("jitter")] == [
        (site, f"{site}#jitter", EPS) for site in sites
    ]
    model = build(name, config).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    keyed, ids = KeyedDropout(model, plan, SEED), torch.tensor(IDS)
    with keyed.context(purpose="train", index=3, row_ids=ids) as active:
        num_items = sum(LENGTHS) - ("Causal" in name) * len(LENGTHS)
        (model(**batch_of([0, 1, 2])).loss * num_items).backward()
    assert keyed.missing(active) == []
    for parameter, expected in by_hand(kind, monkeypatch).items():
        found = model.get_parameter(parameter).grad
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_jitter_is_drawn_in_training_only_and_never_in_secret():
    name, (config, _) = "MixtralForCausalLM", KINDS["MixtralForCausalLM"]
    model, batch = build(name, config), batch_of([0, 1])
    plain = model.eval()(**batch).logits
    keyed = KeyedDropout(model, plan_of(name, config), SEED)
    with keyed.context(purpose="mc", index=0, row_ids=torch.tensor([4, 5])) as active:
        assert model(**batch).logits.equal(plain)
    assert keyed.missing(active) == []
    with pytest.raises(LeakError, match=r"layers\.0\.mlp was asked to drop outside"):
        model.train()(**batch)
    keyed.release()
    assert model.model.layers[0].mlp.jitter_noise == EPS
    assert not model.model.layers[0].mlp._forward_pre_hooks


def test_tokens_that_arrive_as_one_row_are_told_apart():
    tokens, seen = torch.ones(2, 3, 24), []
    model = build("PhimoeForCausalLM", SIZES | {"input_jitter_noise": EPS}).train()
    names = {module: name for name, module in model.named_modules()}
    close = open_jitter(names, lambda door, site, x, eps: seen.append((site, x.shape)) or x)
    model.model.layers[0].mlp(tokens)
    close()
    at = "model.layers.0.mlp"
    assert seen == [(at, (2, 3, 24)), (f"{at}.router", (6, 24))]


def test_what_a_router_draws_beside_its_jitter_is_refused_by_name():
    with pytest.raises(
        DropoutError, match=r"in model\.layers\.0\.mlp\.router: it samples which experts"
    ):
        plan_of("PhimoeForCausalLM", SIZES | {"input_jitter_noise": EPS})


LEVIT = {"image_size": 32, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 3, 4]}
LEVIT |= {"depths": [1, 1, 1], "key_dim": [8, 8, 8], "num_labels": 3}


def levit(rates: dict) -> torch.nn.Module:
    model = build("LevitForImageClassification", LEVIT)
    for layer in model.modules():  # its configuration takes whole numbers alone
        if hasattr(layer, "drop_rate"):
            layer.drop_rate = rates["drop_path_rate"]
    return model


def levit_plan():
    def example(batch: int, length: int):
        return {"pixel_values": torch.ones(batch, 3, 32, 32)}

    defaults = {"drop_path_rate": 0.4}
    blueprint = Blueprint(levit, example, defaults, "levit", True, lambda m: {})
    return make_plan(blueprint, DropoutConfig(path=0.4))


def test_levits_paths_are_dropped_by_sample_as_it_would_itself(monkeypatch):
    plan = levit_plan()
    sites = [site.site for site in plan.in_force("path")]
    assert len(sites) == 8
    model = levit({"drop_path_rate": 0.4}).train()
    pixels, ids = (
        torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1)),
        range(90, 96),
    )
    left = deque(sites)

    def rand(*shape: int, device: object = None) -> Tensor:
        key = derive_key(SEED, "train", 3, "path", left.popleft(), 0)
        words = philox_words(key, 0, 0, np.array(ids, dtype=np.uint64))
        return torch.from_numpy(words[:, 0] / 2.0**32).float().view(shape)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", rand)
        expected = model(pixels).logits
    keyed = KeyedDropout(model, plan, SEED)
    with keyed.context(purpose="train", index=3, row_ids=torch.tensor(ids)) as active:
        torch.testing.assert_close(model(pixels).logits, expected, rtol=1e-5, atol=1e-6)
    assert keyed.missing(active) == []
    keyed.release()
    assert {m.drop_rate for m in model.modules() if hasattr(m, "drop_rate")} == {0.4}
