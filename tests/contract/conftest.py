"""A model that is made from a folder alone: its processor cannot be made from rows."""

from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

LLAVA_TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 1, "intermediate_size": 24, "max_position_embeddings": 128,
              "initializer_range": 0.2}  # fmt: skip
LLAVA_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{% if p.type == 'image' %}<image>"
    "{% else %}{{ p.text }}{% endif %}{% endfor %}{{ eos_token if m.role == 'assistant' }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def save_llava(folder: Path) -> None:
    """A small model of images with text and its processor: a picture of 16 x 16 is 16 tokens."""
    whole = Tokenizer(models.BPE())
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<end>", "<image>"]
    options = {"vocab_size": 300, "special_tokens": special, "initial_alphabet": letters}
    whole.train_from_iterator(
        ["which colour has it"], trainers.BpeTrainer(**options, show_progress=False)
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="<pad>", eos_token="<end>", bos_token="<end>"
    )
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    transformers.LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    ).save_pretrained(folder)
    sees = {"hidden_size": 24, "num_attention_heads": 3, "image_size": 16, "patch_size": 4}
    sees |= {"intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**sees),
        text_config=transformers.LlamaConfig(**LLAVA_TEXT, vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    torch.manual_seed(3)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def llava(tmp_path_factory) -> Path:
    """The folder of a small LLaVA."""
    folder = tmp_path_factory.mktemp("llava")
    save_llava(folder)
    return folder
