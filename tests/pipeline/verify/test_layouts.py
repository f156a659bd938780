"""Layouts by name, and which of them a machine gets."""

import importlib.util

import pytest

from pipeline.errors import ConfigError
from pipeline.verify.layouts import Layout, default_layouts, parse_layouts


def names(layouts):
    return [layout.name for layout in layouts]


def test_layouts_are_read_in_order_and_each_once():
    assert parse_layouts("ddp:2, accumulate:4,padding,ddp:2,resume:1-2") == [
        Layout("ddp:2", (2,), engine="ddp"),
        Layout("accumulate:4", num_micro_batches=4),
        Layout("padding", extra_padding=8),
        Layout("resume:1-2", (1, 2)),
    ]


def test_every_part_that_is_no_layout_is_named_with_what_there_is():
    with pytest.raises(ConfigError, match=r"'dpp:2', 'zero3', 'ddp:0' is no layout.*resume:N-M"):
        parse_layouts("single,dpp:2,zero3,ddp:0")


@pytest.mark.parametrize("text", ["", " , "])
def test_no_layout_at_all_is_an_error(text):
    with pytest.raises(ConfigError, match="nothing is no layout"):
        parse_layouts(text)


@pytest.mark.parametrize("text", ["ddp:3", "accumulate:16", "resume:1-5"])
def test_a_layout_that_cannot_share_out_eight_samples_is_refused(text):
    with pytest.raises(ConfigError, match="choose a divisor of 8"):
        parse_layouts(text)


@pytest.mark.parametrize("num_devices", [0, 1, 2])
@pytest.mark.parametrize("has_deepspeed", [True, False])
def test_every_machine_gets_at_least_eight_layouts(monkeypatch, num_devices, has_deepspeed):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: has_deepspeed or None)
    layouts, notes = default_layouts(num_devices)
    assert len(layouts) >= 8
    assert any("deepspeed is not installed" in note for note in notes) == (not has_deepspeed)
    assert max(max(layout.num_processes) for layout in layouts) == (1 if num_devices == 1 else 2)


@pytest.mark.parametrize("num_devices", [0, 1])
def test_engines_that_refuse_learned_rates_are_left_out_and_said_so(run_config, num_devices):
    learned = run_config(dropout={"insert": {"hidden": {"rate": 0.1, "learned": True}}})
    assert learned.dropout.learns()
    assert not run_config(dropout={"hidden": 0.1}).dropout.learns()
    layouts, (note, *_) = default_layouts(num_devices, learned.dropout.learns())
    assert len(layouts) >= 8
    assert not {layout.engine for layout in layouts} & {"fsdp2", "zero3"}
    assert "are left out: learned rates need each layer's whole weights" in note


def test_only_starts_of_several_processes_or_an_engine_are_launched():
    resume, zero = parse_layouts("resume:1-2,zero3:1")
    assert [resume.preset(0), resume.preset(1), zero.preset(0)] == [None, "ddp", "zero3"]
