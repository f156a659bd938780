"""The feature extractor of a run: the model's own, or for a model from scratch one of its kind."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipeline.config.schema import RunConfig
from pipeline.errors import ModelError
from pipeline.hub import load_pretrained
from pipeline.modality.sounds import Waveform

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig

SAMPLING_RATE = 16_000
WHISPER_HOP = 160  # samples a frame
LEAST_FRAMES = 12  # a span of SpecAugment, 10 frames unless told otherwise, fits in


def load_feature_extractor(config: RunConfig, rows: "Dataset | None" = None) -> Any:
    """What makes `input_values` or `input_features` of audio.

    Raises:
        ModelError: the model has none, or it cannot be loaded.
    """
    from transformers import AutoFeatureExtractor

    model = config.model
    name = model.processor_name_or_path or model.model_name_or_path
    if name is None:
        return _from_scratch(config)
    return load_pretrained("feature extractor", AutoFeatureExtractor, name, config)


def model_inputs(extractor: Any, clips: list[Waveform]) -> dict[str, Tensor]:
    """A batch of clips, each extracted by itself, then padded on the right.

    Alone, so that no clip is normalised with the padding that its batch brings.

    Args:
        extractor: the run's.
        clips: [T] each, at the extractor's rate.

    Returns:
        `input_values` [B, T] of waves, or `input_values` / `input_features` [B, ., .] of
        spectrograms; `attention_mask` [B, T] where the model wants one.
    """
    name = extractor.model_input_names[0]
    values = [_extracted(extractor, clip, name) for clip in clips]
    batch = {name: pad_sequence(values, batch_first=True, padding_value=extractor.padding_value)}
    if extractor.return_attention_mask:
        lengths = torch.tensor([len(one) for one in values])
        places = torch.arange(batch[name].shape[1])
        batch["attention_mask"] = (places[None] < lengths[:, None]).long()
    return batch


def fit_extractor(hf_config: "PreTrainedConfig", extractor: Any, config: RunConfig) -> None:
    """Refuse an extractor whose features the model does not take.

    Raises:
        ModelError: waves for a model of spectrograms or the other way round, or another size.
    """
    wanted = _features_of(hf_config)
    if extractor is None:
        return
    name = extractor.model_input_names[0]
    clip = np.zeros(extractor.sampling_rate // 10, dtype=np.float32)
    values = _extracted(extractor, clip, name)
    found = (name,) if values.dim() == 1 else (name, *values.shape)
    if found != wanted:
        raise ModelError(
            f"The feature extractor makes {_said(found)}, the model {hf_config.model_type} takes "
            f"{_said(wanted)}: they do not belong together. Check model.processor_name_or_path."
        )


def audio_example(
    hf_config: "PreTrainedConfig", batch_size: int, length: int, device: str
) -> dict[str, Tensor]:
    """Features of the model's size, or waves of `length` frames and a few."""
    name, *shape = _features_of(hf_config)
    if not shape:
        num_samples = max(LEAST_FRAMES, getattr(hf_config, "mask_time_length", 0)) + length
        layers = zip(hf_config.conv_kernel, hf_config.conv_stride, strict=True)
        for kernel, stride in reversed(list(layers)):
            num_samples = (num_samples - 1) * stride + kernel
        shape = [num_samples]
    return {name: torch.zeros(batch_size, *shape, device=device)}


def extractor_notes(extractor: Any) -> list[str]:
    """What happens to long clips, and what padding does to a model without attention mask."""
    if getattr(extractor, "nb_max_frames", None):
        return [f"clips are cut or filled up to {extractor.chunk_length} s"]
    if getattr(extractor, "max_length", None):
        return [f"clips are cut or filled up to {extractor.max_length} frames of 10 ms"]
    if extractor.return_attention_mask:
        return []
    return [
        "the model takes no attention mask: it hears the padding of a batch, so that a clip's "
        "numbers (not its masks) depend on the longest clip beside it; models with "
        "feat_extract_norm: layer do not"
    ]


def _extracted(extractor: Any, clip: Waveform, name: str) -> Tensor:
    found = extractor(clip, sampling_rate=extractor.sampling_rate, return_tensors="np")[name][0]
    return torch.from_numpy(np.ascontiguousarray(found, dtype=np.float32))


def _features_of(hf_config: "PreTrainedConfig") -> tuple[Any, ...]:
    """Name of a model's input and its shape without the batch; a wave has any length."""
    if hasattr(hf_config, "conv_stride") and hasattr(hf_config, "conv_kernel"):
        return ("input_values",)
    mels = getattr(hf_config, "num_mel_bins", None)
    if mels and hasattr(hf_config, "max_source_positions"):  # Whisper halves the frames
        return ("input_features", mels, 2 * hf_config.max_source_positions)
    if mels and hasattr(hf_config, "frequency_stride"):  # AST
        return ("input_values", hf_config.max_length, mels)
    raise ModelError(
        f"{hf_config.model_type} is not an audio model that is known here: there are those of "
        "waves (wav2vec2, hubert, wavlm, ...), whisper and audio-spectrogram-transformer."
    )


def _said(features: tuple[Any, ...]) -> str:
    name, *shape = features
    return f"{name} of {' x '.join(map(str, shape))}" if shape else f"{name} of waves"


def _from_scratch(config: RunConfig) -> Any:
    import transformers
    from transformers import AutoConfig

    model, rate = config.model, config.model.sampling_rate or SAMPLING_RATE
    assert model.model_type is not None
    hf_config = AutoConfig.for_model(model.model_type, **model.config_overrides)
    name, *shape = _features_of(hf_config)
    if not shape:
        # A group norm runs over all frames: such models are trained without a mask.
        has_mask = getattr(hf_config, "feat_extract_norm", "layer") == "layer"
        return transformers.Wav2Vec2FeatureExtractor(
            sampling_rate=rate, return_attention_mask=has_mask
        )
    if name == "input_features":
        mels, num_frames = shape
        if num_frames * WHISPER_HOP % rate:
            raise ModelError(
                f"model.config_overrides.max_source_positions: whisper's extractor makes whole "
                f"seconds of audio, so it is a multiple of {rate // WHISPER_HOP // 2}."
            )
        return transformers.WhisperFeatureExtractor(
            feature_size=mels, sampling_rate=rate, chunk_length=num_frames * WHISPER_HOP // rate
        )
    num_frames, mels = shape
    return transformers.ASTFeatureExtractor(
        sampling_rate=rate, num_mel_bins=mels, max_length=num_frames
    )
