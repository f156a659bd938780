"""A line of models with stages of milliseconds, for every test of retraining."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from retraining_doubles import World  # noqa: E402


@pytest.fixture
def world(tmp_path, monkeypatch):
    """No test here cuts the power: what is written is there."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    made = World(tmp_path)
    made.make_champion(0.7)
    made.next_model_is(0.8)
    return made
