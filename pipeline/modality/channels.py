"""One channel of a model over several encoders, seen as a run of its own; its processors.

What is known about tokenizers, image processors and feature extractors then serves as it is.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.schema import ModelConfig, RunConfig
from pipeline.errors import ModelError

FOLDER = "processors"
_FIELDS = "|".join(
    ("model_name_or_path", "model_type", "config_overrides", "model_revision")
    + ("tokenizer_name_or_path", "processor_name_or_path", "sampling_rate", "tokenizer_vocab_size")
)


def channel_run(config: RunConfig, name: str) -> RunConfig:
    """The run as if this channel were its model.

    Where the whole names a folder with processors (a trained run does), the channel's own is there.
    """
    channel = config.model.channels[name]
    own = channel.model_dump(exclude={"modality"})
    if (saved := config.model.processor_name_or_path) is not None:
        place = str(Path(saved) / FOLDER / name)
        own |= {"tokenizer_name_or_path": place, "processor_name_or_path": place}
    left_out: dict[str, Any] = {"channels": {}, "weights_sha256": None, "quantization_config": None}
    model: ModelConfig = config.model.model_copy(update={**own, **left_out})
    source = config.data.channel_column_names[name]
    columns = {f"{kind}_column_name": source for kind in ("text", "image", "audio")}
    return config.model_copy(
        update={"model": model, "data": config.data.model_copy(update=columns)}
    )


@contextmanager
def of_channel(name: str) -> Iterator[None]:
    """An error about the model inside is one about this channel."""
    try:
        yield
    except ModelError as error:
        place = rf"model.channels.{name}.\1"
        said = re.sub(rf"\bmodel\.({_FIELDS})\b", place, str(error))
        raise ModelError(f"Channel {name}: {said}") from error


@dataclass(frozen=True)
class ChannelProcessor:
    """What makes model inputs of every channel: tokenizer, image processor, feature extractor."""

    parts: dict[str, Any]

    def save_pretrained(self, folder: str | Path) -> None:
        """Each in Hugging Face format under `processors/<channel>`."""
        for name, part in self.parts.items():
            part.save_pretrained(Path(folder) / FOLDER / name)
