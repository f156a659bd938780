"""Everything that differs by modality, one bundle a task; importing this registers them all."""

from pipeline.modality import chat, image_chat, language, multimodal, speech, vision
from pipeline.modality.bundle import MODALITIES, Modality

__all__ = [
    "MODALITIES",
    "Modality",
    "chat",
    "image_chat",
    "language",
    "multimodal",
    "speech",
    "vision",
]
