"""The tokenizer of a run: the model's own, or one trained on the training text.

A model from scratch needs a vocabulary, and offline there is none to download: so one is made.
"""

from collections.abc import Iterable
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from pipeline.config.schema import RunConfig
from pipeline.errors import ModelError
from pipeline.hub import load_pretrained


def load_tokenizer(config: RunConfig, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or a byte-level BPE trained on `texts` where none is named."""
    name = config.model.tokenizer_name_or_path or config.model.model_name_or_path
    if name is None:
        return _trained_tokenizer(texts, config.model.tokenizer_vocab_size)
    return load_pretrained("tokenizer", AutoTokenizer, name, config)


def fit_to_tokenizer(
    hf_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None, config: RunConfig
) -> None:
    """Give the model its tokenizer's special tokens, and a new model its vocabulary.

    Raises:
        ModelError: the tokenizer has more tokens than the model.
    """
    vocab_size = getattr(hf_config.get_text_config(), "vocab_size", 0)
    if tokenizer is None:
        padding = getattr(hf_config, "pad_token_id", None)
        hf_config.pad_token_id = padding if padding is not None and padding < vocab_size else 0
        return
    if config.model.model_type is not None:
        hf_config.vocab_size = len(tokenizer)
        hf_config.bos_token_id = tokenizer.bos_token_id
        hf_config.eos_token_id = tokenizer.eos_token_id
    elif len(tokenizer) > vocab_size:
        raise ModelError(
            f"The tokenizer has {len(tokenizer)} tokens, the model {vocab_size}: they do not "
            "belong together; check model.tokenizer_name_or_path."
        )
    hf_config.pad_token_id = tokenizer.pad_token_id


def token_example(
    hf_config: PreTrainedConfig, batch_size: int, length: int, device: str
) -> dict[str, Any]:
    """Tokens to trace a forward pass with, all the same but the last, the end."""
    ids = torch.ones(batch_size, length, dtype=torch.long, device=device)
    text_config = hf_config.get_text_config()
    end = getattr(text_config, "eos_token_id", None)
    if device != "meta" and isinstance(end, int) and end < text_config.vocab_size:
        ids[:, -1] = end
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _trained_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|pad|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", bos_token="<|end|>"
    )
