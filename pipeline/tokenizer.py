"""The tokenizer of a run: the model's own, or one trained on the training text.

A model from scratch needs a vocabulary, and offline there is none to download: so one is made.
"""

from collections.abc import Iterable

import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.config.schema import RunConfig
from pipeline.model_config import load_pretrained


def load_tokenizer(config: RunConfig, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or a byte-level BPE trained on `texts` where none is named."""
    name = config.model.tokenizer_name_or_path or config.model.model_name_or_path
    if name is None:
        return _trained_tokenizer(texts, config.model.tokenizer_vocab_size)
    return load_pretrained("tokenizer", AutoTokenizer, name, config)


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
