"""A line of models with stages of milliseconds, for every test of retraining."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from retraining_doubles import World, be_quick  # noqa: E402

from launch.retrain import place  # noqa: E402


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", os.fsync)  # put back afterwards
    monkeypatch.setattr(place, "load_config", place.load_config)
    monkeypatch.setattr(place, "dump_config", place.dump_config)
    be_quick()
    made = World(tmp_path)
    made.make_champion(0.7)
    made.next_model_is(0.8)
    return made
