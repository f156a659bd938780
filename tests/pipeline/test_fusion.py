"""A model over several encoders: its numbers, its files, what it refuses."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    CLIPVisionConfig,
    ConvNextConfig,
    T5Config,
    ViTConfig,
    Wav2Vec2Config,
    WhisperConfig,
)

from pipeline.encoders import pooled
from pipeline.errors import ModelError
from pipeline.fusion import ChannelFusionConfig, ChannelFusionForClassification

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 32}  # fmt: skip
BERT = BertConfig(vocab_size=30, **SMALL)
VIT = ViTConfig(image_size=8, patch_size=4, num_channels=1, **SMALL)
PIXELS = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 0, 0, 0], [3, 4, 5, 6, 7]])
TEXT = {"text.input_ids": IDS, "text.attention_mask": (IDS > 0).long()}
BATCH = {"photo.pixel_values": PIXELS, **TEXT}


def make_model(text=BERT, photo=VIT, **fields) -> ChannelFusionForClassification:
    torch.manual_seed(3)
    config = ChannelFusionConfig(
        channel_names=["text", "photo"], channel_modalities=["text", "image"],
        text_config=text, photo_config=photo, num_labels=4, projection_dim=8, **fields,
    )  # fmt: skip
    model = ChannelFusionForClassification(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def by_hand(model, present=None):
    """The logits in plain torch, from the encoders' last states."""
    text, photo, head = model.encoders.text_model, model.encoders.photo_model, model.fusion
    states = text(input_ids=IDS, attention_mask=(IDS > 0).long()).last_hidden_state
    lengths = (IDS > 0).sum(1)
    text_mean = torch.stack([row[:n].mean(0) for row, n in zip(states, lengths, strict=True)])
    vectors = [text_mean, photo(pixel_values=PIXELS).pooler_output]
    parts = [project(vector) for project, vector in zip(head.projections, vectors, strict=True)]
    for place in range(2) if present is not None else ():
        parts[place] = torch.stack(
            [head.missing[place] if not there else row
             for there, row in zip(present[:, place], parts[place], strict=True)]
        )  # fmt: skip
    hidden = nn.functional.gelu(head.dense(torch.cat(parts, dim=1)))
    return head.classifier(hidden)


def test_logits_are_those_of_the_formula():
    model = make_model()
    assert torch.allclose(model(**BATCH).logits, by_hand(model), atol=1e-6)


def test_a_missing_channel_is_replaced_row_by_row():
    model, present = make_model(), torch.tensor([[1, 1], [0, 1], [1, 0]])
    found = model(**BATCH, present=present).logits
    assert torch.allclose(found, by_hand(model, present), atol=1e-6)


def test_what_is_missing_has_no_influence_and_its_vector_gets_the_gradient():
    model, present = make_model(), torch.tensor([[1, 0]] * 3)
    other = {**BATCH, "photo.pixel_values": torch.full_like(PIXELS, torch.nan)}
    assert torch.equal(
        model(**BATCH, present=present).logits, model(**other, present=present).logits
    )
    model(**BATCH, present=present).logits.sum().backward()
    assert model.fusion.missing.grad[1].abs().sum() > 0
    assert model.fusion.missing.grad[0].abs().sum() == 0


def test_the_loss_is_the_mean_cross_entropy():
    model, labels = make_model(), torch.tensor([0, 3, 1])
    outputs = model(**BATCH, labels=labels)
    expected = nn.functional.cross_entropy(outputs.logits, labels)
    assert torch.equal(outputs.loss, expected)


def test_a_saved_model_comes_back_with_the_order_of_its_channels(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert list(AutoConfig.from_pretrained(tmp_path).channels) == ["text", "photo"]
    again = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, attn_implementation="eager"
    )
    eager = make_model()
    eager.set_attn_implementation("eager")
    eager.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(**BATCH).logits, eager(**BATCH).logits)


def test_new_models_begin_with_missing_channels_of_zero():
    assert ChannelFusionForClassification(make_model().config).fusion.missing.abs().sum() == 0


def test_every_weight_gets_a_gradient():
    model, present = make_model().train(), torch.tensor([[1, 1], [0, 1], [1, 0]])
    model(**BATCH, present=present).logits.square().sum().backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert unused == []


@pytest.mark.parametrize(
    "photo",
    [ConvNextConfig(num_channels=1, num_stages=2, hidden_sizes=[8, 12], depths=[1, 1],
                    patch_size=1, image_size=8),
     CLIPVisionConfig(image_size=8, patch_size=4, num_channels=1, projection_dim=8, **SMALL)],
)  # fmt: skip
def test_other_encoders_of_images_serve_as_well(photo):
    assert make_model(photo=photo)(**BATCH).logits.shape == (3, 4)


def test_an_encoder_decoder_gives_its_encoder():
    t5 = T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    model = make_model(text=t5)
    assert not [name for name, _ in model.named_parameters() if "decoder" in name]
    assert model(**BATCH).logits.shape == (3, 4)


def test_waves_are_averaged_over_the_frames_that_are_no_padding():
    shape = {"conv_dim": [8, 8], "conv_kernel": [10, 3], "conv_stride": [5, 2],
             "num_feat_extract_layers": 2, "feat_extract_norm": "layer", "conv_bias": True,
             "do_stable_layer_norm": True, "num_conv_pos_embeddings": 4,
             "num_conv_pos_embedding_groups": 2}  # fmt: skip
    config = ChannelFusionConfig(
        channel_names=["clip", "text"], channel_modalities=["audio", "text"],
        clip_config=Wav2Vec2Config(**SMALL, **shape), text_config=BERT, num_labels=4,
    )  # fmt: skip
    encoder = ChannelFusionForClassification(config).eval().encoders.clip_model
    wave = torch.rand(1, 300)
    alone = pooled(encoder, "audio", {"input_values": wave, "attention_mask": torch.ones(1, 300)})
    padded = {"input_values": torch.nn.functional.pad(wave, (0, 200)),
              "attention_mask": (torch.arange(500) < 300).long()[None]}  # fmt: skip
    assert torch.allclose(alone, pooled(encoder, "audio", padded), atol=1e-5)


def test_whisper_gives_its_encoder_of_spectrograms():
    whisper = WhisperConfig(
        num_mel_bins=8, max_source_positions=20, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, vocab_size=60,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    config = ChannelFusionConfig(
        channel_names=["clip", "text"], channel_modalities=["audio", "text"],
        clip_config=whisper, text_config=BERT, num_labels=4,
    )  # fmt: skip
    batch = {"clip.input_features": torch.rand(3, 8, 40), **TEXT}
    assert ChannelFusionForClassification(config).eval()(**batch).logits.shape == (3, 4)


def test_a_batch_without_a_channel_is_refused_with_what_it_holds():
    with pytest.raises(ModelError, match=r"no image for the channel 'photo'.*text.input_ids"):
        make_model()(**TEXT)


def test_an_encoder_that_reads_something_else_is_refused():
    with pytest.raises(ModelError, match="bert reads input_ids, not image"):
        make_model(photo=BERT)
