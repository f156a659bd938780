"""Small models of many families, bound to keyed dropout; nothing is loaded or trained."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.config.schema import RunConfig
from pipeline.dropout.context import KeyedDropout
from pipeline.model import build_model, plan_for

C, G = "text-classification", "text-generation"
BERT = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 1, "vocab_size": 61}
BERT |= {"intermediate_size": 40, "max_position_embeddings": 34}
LLAMA = BERT | {"num_attention_heads": 4, "num_key_value_heads": 2}
GPT2 = {"n_embd": 24, "n_head": 3, "n_layer": 1, "vocab_size": 61, "n_positions": 34}
BART = {"d_model": 24, "vocab_size": 61, "max_position_embeddings": 34}
BART |= {f"{part}_{name}": n for part in ("encoder", "decoder")
         for name, n in {"layers": 1, "attention_heads": 3, "ffn_dim": 40}.items()}  # fmt: skip
T5 = {"d_model": 24, "num_heads": 3, "d_kv": 8, "d_ff": 40, "num_layers": 1, "vocab_size": 61}
T5 |= {"num_decoder_layers": 1, "decoder_start_token_id": 0}
XGLM = {"d_model": 24, "attention_heads": 3, "num_layers": 1, "ffn_dim": 40, "vocab_size": 61}

SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": (C, BERT),
    "roberta": (C, BERT),
    "distilbert": (C, {"dim": 24, "n_heads": 3, "n_layers": 1, "hidden_dim": 40, "vocab_size": 61}),
    "deberta-v2": (C, BERT | {"position_buckets": 8, "relative_attention": True}),
    "electra": (C, BERT | {"embedding_size": 16}),
    "albert": (C, BERT | {"embedding_size": 16, "num_hidden_layers": 2}),
    "modernbert": (C, BERT),
    "gpt2": (G, GPT2),
    "llama": (G, LLAMA),
    "qwen3": (G, LLAMA | {"head_dim": 8}),
    "mistral": (G, LLAMA),
    "mixtral": (G, LLAMA | {"num_local_experts": 2, "head_dim": 8}),
    "gemma3_text": (G, LLAMA | {"head_dim": 8}),
    "opt": (G, {k: v for k, v in BERT.items() if k != "intermediate_size"} | {"ffn_dim": 40}),
    "bart": (C, BART),
    "t5": (C, T5),
    "gpt_neox": (G, LLAMA | {"num_key_value_heads": None}),
    "phi3": (G, LLAMA),
    "xlnet": (C, {"d_model": 24, "n_layer": 1, "n_head": 3, "d_inner": 40, "vocab_size": 61}),
    "bloom": (G, {"hidden_size": 24, "n_head": 3, "n_layer": 1, "vocab_size": 61}),
    "falcon": (G, {k: BERT[k] for k in list(BERT)[:4]}),
    "xglm": (G, XGLM),
    "squeezebert": (C, BERT | {"embedding_size": 24, "num_attention_heads": 4}),
    "longformer": (C, BERT | {"attention_window": 4}),
}
SMALL["opt"][1]["word_embed_proj_dim"] = 24
del SMALL["gpt_neox"][1]["num_key_value_heads"]

ConfigOf = Callable[..., RunConfig]


@pytest.fixture
def config_of(tmp_path) -> ConfigOf:
    """Makes the configuration of a small model: from scratch, or saved for an adapter."""

    def make(model_type: str, dropout: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
        task, overrides = SMALL[model_type]
        overrides = {**overrides, **sections.pop("overrides", {})}
        model = {"task": task, "model_type": model_type, "config_overrides": overrides}
        model |= sections.pop("model", {})
        config = RunConfig(
            name="small",
            seed=1234567,
            model=model,
            data={"path": "unused", "max_length": 16, **sections.pop("data", {})},
            dropout=dropout or {},
            train=sections.pop("train", {}),
        )
        if "peft" not in sections:
            return config
        torch.manual_seed(0)
        build_model(config, None, plan_for(config)).save_pretrained(tmp_path / model_type)
        saved = {"task": task, "model_name_or_path": str(tmp_path / model_type)}
        return RunConfig(**{**config.model_dump(), "model": saved, **sections})

    return make


class Bound:
    """A small model with its plan and keyed dropout."""

    def __init__(self, config: RunConfig, model: nn.Module | None = None) -> None:
        self.config, self.plan = config, plan_for(config)
        self.model = build_model(config, None, self.plan) if model is None else model
        self.keyed = KeyedDropout(self.model, self.plan, config.seed)

    def logits(self, index: Any = 0, row_ids: Any = None, **batch: Any) -> Tensor:
        """The logits of a pass in evaluation mode, under its masks."""
        self.model.eval()
        ids = torch.arange(len(batch["input_ids"])) + 70 if row_ids is None else row_ids
        context = self.keyed.context(purpose="mc", index=index, row_ids=torch.as_tensor(ids))
        with torch.no_grad(), context:
            return self.model(**batch).logits

    @contextmanager
    def recorded(self) -> Iterator[dict[str, list[Tensor]]]:
        """What every `nn.Dropout` lets through, call by call: True where an entry was kept."""
        kept: dict[str, list[Tensor]] = {}
        handles = [
            module.register_forward_hook(
                lambda m, args, out, name=name: kept.setdefault(name, []).append(out != 0)
            )
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Dropout)
        ]
        try:
            yield kept
        finally:
            for handle in handles:
                handle.remove()


@pytest.fixture
def bind(config_of) -> Callable[..., Bound]:
    """Builds a small model and opens its doors."""

    def make(*args: Any, **kwargs: Any) -> Bound:
        torch.manual_seed(0)
        return Bound(config_of(*args, **kwargs))

    return make


@pytest.fixture
def tokens() -> Callable[..., dict[str, Tensor]]:
    """A batch of tokens without padding."""

    def make(num_rows: int = 3, length: int = 7) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(5)
        ids = torch.randint(2, 61, (num_rows, length), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return make
