"""Everything that differs by modality, one bundle a task; importing this registers them all."""

from pipeline.modality import chat, language, speech, vision
from pipeline.modality.bundle import MODALITIES, Modality

__all__ = ["MODALITIES", "Modality", "chat", "language", "speech", "vision"]
