"""The promise itself: masks, gradients and weights equal a plain loop over unpadded single samples.

The reference knows nothing of doors, contexts or plans: it walks a hand-written list of sites,
in the order in which the model calls them, and draws every mask from the specification.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.config.schema import RunConfig
from pipeline.dropout.context import KeyedDropout
from pipeline.dropout.key import derive_key
from pipeline.dropout.philox import philox4x32_10
from pipeline.model import build_model, plan_for

SEED, STEPS, NUM_SAMPLES, VOCABULARY = 1234567, 3, 16, 61
LABELS = ("a", "b", "c")


@dataclass(frozen=True)
class Family:
    """A small model and, by hand, the sites it calls in order: (site, call, variant, rate)."""

    model_type: str
    task: str
    overrides: dict[str, Any]
    dropout: dict[str, Any]
    sites: list[tuple[str, int, str, float]]
    peft: dict[str, Any] | None = None
    inserted: list[str] = field(default_factory=list)
    pads_left: bool = False


def bert_sites() -> list[tuple[str, int, str, float]]:
    sites = [("bert.embeddings.dropout", 0, "element", 0.1)]
    for layer in range(2):
        at = f"bert.encoder.layer.{layer}"
        sites += [
            (f"{at}.attention.self", 0, "attention", 0.2),
            (f"{at}.attention.output.dropout", 0, "element", 0.1),
            (f"{at}.output.dropout", 0, "element", 0.1),
        ]
    return [*sites, ("dropout", 0, "element", 0.3)]


def llama_sites() -> list[tuple[str, int, str, float]]:
    sites = [("model.embed_tokens", 0, "element", 0.1)]
    for layer in range(2):
        at = f"model.layers.{layer}"
        sites += [
            (f"{at}.self_attn.q_proj.lora_dropout.default", 0, "element", 0.2),
            (f"{at}.self_attn.v_proj.lora_dropout.default", 0, "element", 0.2),
            (f"{at}.self_attn", 0, "element", 0.15),
            (f"{at}.mlp", 0, "element", 0.15),
        ]
    return sites


def gpt2_sites() -> list[tuple[str, int, str, float]]:
    sites = [("transformer.drop", 0, "element", 0.1)]
    for layer in range(2):
        at = f"transformer.h.{layer}"
        sites += [
            (f"{at}.attn", 0, "attention", 0.2),
            (f"{at}.attn.resid_dropout", 0, "token", 0.1),
            (f"{at}.mlp.dropout", 0, "token", 0.1),
        ]
    return sites


def modernbert_sites() -> list[tuple[str, int, str, float]]:
    sites = [("model.embeddings.drop", 0, "element", 0.1)]
    for layer in range(2):
        at = f"model.layers.{layer}"
        sites += [
            (f"{at}.attn", 0, "attention", 0.2),
            (f"{at}.attn.out_drop", 0, "channel", 0.1),
            (f"{at}.mlp.drop", 0, "element", 0.25),
        ]
    return [*sites, ("drop", 0, "element", 0.3)]


def t5_sites() -> list[tuple[str, int, str, float]]:
    encoder, decoder = "transformer.encoder", "transformer.decoder"
    return [
        (f"{encoder}.dropout", 0, "element", 0.05),
        (f"{encoder}.block.0.layer.0.SelfAttention", 0, "attention", 0.2),
        (f"{encoder}.block.0.layer.0.dropout", 0, "element", 0.1),
        (f"{encoder}.block.0.layer.1.DenseReluDense.dropout", 0, "element", 0.15),
        (f"{encoder}.block.0.layer.1.dropout", 0, "element", 0.1),
        (f"{encoder}.dropout", 1, "element", 0.1),
        (f"{decoder}.dropout", 0, "element", 0.05),
        (f"{decoder}.block.0.layer.0.SelfAttention", 0, "attention", 0.2),
        (f"{decoder}.block.0.layer.0.dropout", 0, "element", 0.1),
        (f"{decoder}.block.0.layer.1.EncDecAttention", 0, "attention", 0.2),
        (f"{decoder}.block.0.layer.1.dropout", 0, "element", 0.1),
        (f"{decoder}.block.0.layer.2.DenseReluDense.dropout", 0, "element", 0.15),
        (f"{decoder}.block.0.layer.2.dropout", 0, "element", 0.1),
        (f"{decoder}.dropout", 1, "element", 0.1),
        ("classification_head.dropout", 0, "element", 0.3),
        ("classification_head.dropout", 1, "element", 0.3),
    ]


SMALL = {
    "hidden_size": 24,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "vocab_size": VOCABULARY,
}
FAMILIES = {
    "bert": Family(
        "bert",
        "text-classification",
        {**SMALL, "intermediate_size": 40, "max_position_embeddings": 32},
        {"embedding": 0.1, "hidden": 0.1, "attention": 0.2, "head": 0.3},
        bert_sites(),
    ),
    "llama-lora": Family(
        "llama",
        "text-generation",
        {**SMALL, "intermediate_size": 40, "num_key_value_heads": 1, "max_position_embeddings": 32},
        {"adapter": 0.2, "insert": {"embedding": 0.1, "hidden": 0.15}},
        llama_sites(),
        peft={
            "peft_type": "LORA",
            "r": 4,
            "target_modules": ["q_proj", "v_proj"],
            "init_lora_weights": False,
        },
        inserted=["model.embed_tokens", "model.layers.0.self_attn", "model.layers.0.mlp"]
        + ["model.layers.1.self_attn", "model.layers.1.mlp"],
        pads_left=True,
    ),
    "gpt2": Family(
        "gpt2",
        "text-generation",
        {"n_embd": 24, "n_head": 3, "n_layer": 2, "vocab_size": VOCABULARY, "n_positions": 32},
        {"embedding": 0.1, "hidden": {"rate": 0.1, "variant": "token"}, "attention": 0.2},
        gpt2_sites(),
    ),
    "modernbert": Family(
        "modernbert",
        "text-classification",
        {**SMALL, "intermediate_size": 40, "max_position_embeddings": 32},
        {
            "embedding": 0.1,
            "hidden": {"rate": 0.1, "variant": "channel"},
            "attention": 0.2,
            "activation": 0.25,
            "head": 0.3,
        },
        modernbert_sites(),
    ),
    "t5": Family(
        "t5",
        "text-classification",
        {
            "d_model": 24,
            "num_heads": 3,
            "d_kv": 8,
            "d_ff": 40,
            "num_layers": 1,
            "vocab_size": VOCABULARY,
        }
        | {"num_decoder_layers": 1, "decoder_start_token_id": 0},
        {"embedding": 0.05, "hidden": 0.1, "attention": 0.2, "activation": 0.15, "head": 0.3},
        t5_sites(),
    ),
}


@pytest.fixture(params=FAMILIES, scope="module")
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def config(family: Family, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("model")
    save_small_model(family, folder)
    return RunConfig(
        name="contract",
        seed=SEED,
        model={"task": family.task, "model_name_or_path": str(folder)},
        data={"path": "unused", "max_length": 32},
        dropout=family.dropout,
        peft=family.peft,
    )


def save_small_model(family: Family, folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    torch.manual_seed(0)
    kind = AutoModelForSequenceClassification if "class" in family.task else AutoModelForCausalLM
    tokens = {
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 1,
        "cls_token_id": 1,
        "sep_token_id": 1,
    }
    hf_config = AutoConfig.for_model(family.model_type, **family.overrides, **tokens)
    hf_config.num_labels = len(LABELS)
    kind.from_config(hf_config).save_pretrained(folder)


def samples(task: str) -> list[dict[str, Any]]:
    generator = np.random.default_rng(5)
    rows = []
    for place in range(NUM_SAMPLES):
        ids = generator.integers(2, VOCABULARY, size=generator.integers(3, 12)).tolist() + [1]
        label = int(generator.integers(len(LABELS))) if "class" in task else ids
        rows.append({"sample_id": 1000 + 37 * place, "input_ids": ids, "label": label})
    return rows


# -- the plain reference ---------------------------------------------------------------------------


def lanes(key: int, counters: np.ndarray) -> np.ndarray:
    words = philox4x32_10(key, counters.astype(np.uint32))
    return np.stack([words & 0xFFFF, words >> 16], -1).reshape(*words.shape[:-1], 8)


def mask_by_hand(
    key: int, variant: str, sample_id: int, shape: tuple[int, ...], rate: float
) -> torch.Tensor:
    """keep / (1 - rate) of one sample whose tokens stand at positions 0, 1, 2, ..."""
    width = shape[-1]
    if variant == "attention":
        _, heads, queries, _ = shape
        c0 = (np.arange(heads)[:, None, None] << 20) | (np.arange(-(-width // 8))[None, None])
        c1 = np.arange(queries)[None, :, None]
    else:
        length = shape[1] if len(shape) == 3 else 1
        c0 = np.arange(-(-width // 8))[None]
        c1 = np.arange(length)[:, None]
        if variant == "channel":
            c1 = np.full((length, 1), 0xFFFFFFFF)
        if variant == "token":
            c0 = np.zeros_like(c0)
    c0, c1 = np.broadcast_arrays(c0, c1)
    counters = np.stack([c0, c1, np.full_like(c0, sample_id), np.zeros_like(c0)], -1)
    drawn = lanes(key, counters)
    if variant == "token":
        drawn = np.repeat(drawn[..., :1], 8, axis=-1)
    drawn = drawn.reshape(*drawn.shape[:-2], -1)[..., :width]
    t = round(65536 * rate)
    scale = np.float32(65536 / (65536 - t))
    return torch.from_numpy((drawn >= t) * scale.astype(np.float64)).reshape(shape)


class HandMasks:
    """Gives the sites of the list their masks, in order, for one sample and one step."""

    def __init__(self, family: Family, step: int, sample_id: int) -> None:
        self.sites = iter(family.sites)
        self.step, self.sample_id = step, sample_id

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        site, call, variant, rate = next(self.sites)
        key = derive_key(SEED, "train", self.step, variant, site, call)
        return x * mask_by_hand(key, variant, self.sample_id, tuple(x.shape), rate)


def losses(family: Family, logits: torch.Tensor, row: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """Summed loss and number of items of one unpadded sample."""
    if "class" in family.task:
        return nn.functional.cross_entropy(logits, torch.tensor([row["label"]])), 1
    targets = torch.tensor(row["label"][1:])
    return nn.functional.cross_entropy(logits[0, :-1], targets, reduction="sum"), len(targets)


def train_by_hand(
    family: Family, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> dict[str, torch.Tensor]:
    plan = plan_for(config, LABELS)
    model = build_model(config, LABELS, plan).double().train()
    masks: list[HandMasks] = []
    dead = {"attention"} - {variant for _, _, variant, _ in family.sites}
    functional = (lambda x, **_: x) if dead else (lambda x, *a, **k: masks[-1](x))
    monkeypatch.setattr(nn.functional, "dropout", functional)
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: masks[-1](x))

    def hook(module: nn.Module, args: Any, out: Any) -> Any:
        return (masks[-1](out[0]), *out[1:]) if isinstance(out, tuple) else masks[-1](out)

    for name, module in model.named_modules():
        if name.removeprefix("base_model.model.") in family.inserted:
            module.register_forward_hook(hook)
    optimizer = adamw(model)
    rows = samples(family.task)
    for step in range(STEPS):
        optimizer.zero_grad()
        total, items = torch.zeros(()).double(), 0
        for row in rows:
            masks.append(HandMasks(family, step, row["sample_id"]))
            loss, count = losses(
                family, model(input_ids=torch.tensor([row["input_ids"]])).logits, row
            )
            total, items = total + loss, items + count
            assert next(masks[-1].sites, None) is None
        (total / items).backward()
        optimizer.step()
    return state(model)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    # A larger epsilon than usual: AdamW turns the rounding of a gradient of zero into a whole step.
    return torch.optim.AdamW(trained, lr=3e-3, eps=1e-4)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[f"weight {name}"] = parameter.detach().clone()
            found[f"gradient {name}"] = parameter.grad.clone()  # type: ignore[union-attr]
    return found


# -- the same steps with keyed dropout -------------------------------------------------------------


def batch_of(family: Family, rows: list[dict[str, Any]], length: int) -> dict[str, torch.Tensor]:
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    attended = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        size = len(row["input_ids"])
        where = slice(length - size, length) if family.pads_left else slice(0, size)
        ids[place, where] = torch.tensor(row["input_ids"])
        attended[place, where] = 1
    return {"input_ids": ids, "attention_mask": attended}


def batch_loss(
    family: Family, logits: torch.Tensor, batch: dict[str, Any], rows: list[dict[str, Any]]
) -> Any:
    if "class" in family.task:
        labels = torch.tensor([row["label"] for row in rows])
        return nn.functional.cross_entropy(logits, labels, reduction="sum")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    first = batch["attention_mask"].cumsum(-1) == 1
    labels = labels.masked_fill(first, -100)[:, 1:]
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum"
    )


def train_keyed(
    family: Family,
    config: RunConfig,
    micro_batch: int = 16,
    extra_padding: int = 0,
    order: list[int] | None = None,
    checkpointing: dict[str, Any] | None = None,
    row_ids: Any = None,
) -> dict[str, torch.Tensor]:
    plan = plan_for(config, LABELS)
    model = build_model(config, LABELS, plan).double().train()
    keyed = KeyedDropout(model, plan, SEED)
    if checkpointing is not None:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=checkpointing)
    optimizer = adamw(model)
    rows = [samples(family.task)[place] for place in order or range(NUM_SAMPLES)]
    items = sum(1 if "class" in family.task else len(row["input_ids"]) - 1 for row in rows)
    for step in range(STEPS):
        optimizer.zero_grad()
        for start in range(0, NUM_SAMPLES, micro_batch):
            part = rows[start : start + micro_batch]
            longest = max(len(row["input_ids"]) for row in part) + extra_padding
            batch = batch_of(family, part, longest)
            ids = (
                torch.tensor([row["sample_id"] for row in part])
                if row_ids is None
                else row_ids(part)
            )
            with keyed.context(purpose="train", index=step, row_ids=ids):
                loss = batch_loss(family, model(**batch).logits, batch, part) / items
                loss.backward()
        optimizer.step()
    return state(model)


def assert_same(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5
) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().clamp(min=1e-3)
        difference = (found[name] - value).abs().max() / scale
        assert difference < tolerance, f"{name} differs by {difference:.2e} relative"


@pytest.fixture(scope="module")
def by_hand(family: Family, config: RunConfig) -> dict[str, torch.Tensor]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return train_by_hand(family, config, monkeypatch)


def test_plan_is_the_hand_made_list(family: Family, config: RunConfig) -> None:
    plan = plan_for(config, LABELS)
    live = [(site.site, site.call, site.variant, site.rate) for site in plan.in_force()]
    assert live == family.sites


LAYOUTS = {
    "one batch of 16": {},
    "4 x 4": {"micro_batch": 4},
    "more padding": {"extra_padding": 5},
    "another order": {
        "order": [7, 2, 15, 0, 9, 4, 12, 1, 3, 14, 6, 5, 13, 8, 11, 10],
        "micro_batch": 8,
    },
    "checkpointing": {"checkpointing": {"use_reentrant": False}, "micro_batch": 8},
    "reentrant checkpointing": {"checkpointing": {"use_reentrant": True}, "micro_batch": 8},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_equals_the_plain_loop(
    layout: str, family: Family, config: RunConfig, by_hand: dict[str, torch.Tensor]
) -> None:
    assert_same(train_keyed(family, config, **LAYOUTS[layout]), by_hand)


def test_rows_in_place_of_sample_ids_break_the_promise(
    family: Family, config: RunConfig, by_hand: dict[str, torch.Tensor]
) -> None:
    broken = train_keyed(family, config, row_ids=lambda part: torch.arange(len(part)))
    with pytest.raises(AssertionError, match="differs by"):
        assert_same(broken, by_hand)
