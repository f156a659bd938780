"""Libraries are silenced one line at a time: what matters stays visible."""

import logging
import warnings

import pytest
from transformers.utils import logging as library

from pipeline.library_output import (
    without_bars,
    without_load_report,
    without_old_collectives,
    without_old_names,
)

LOADING = logging.getLogger("transformers.modeling_utils")


def test_only_the_expected_warning_is_silenced():
    with without_old_names():
        warnings.warn("`is_gradient_checkpointing` is deprecated and", FutureWarning, stacklevel=1)
        with pytest.raises(FutureWarning):
            warnings.warn("something else is deprecated", FutureWarning, stacklevel=1)


def test_the_load_report_is_held_back_and_other_warnings_are_not(caplog):
    with without_load_report():
        LOADING.warning("BertModel LOAD REPORT from: here")
        LOADING.warning("something else")
    LOADING.warning("BertModel LOAD REPORT from: there")
    assert [r.getMessage() for r in caplog.records] == [
        "something else",
        "BertModel LOAD REPORT from: there",
    ]


def test_the_load_report_is_shown_when_loading_fails(caplog):
    def load() -> None:
        LOADING.warning("BertModel LOAD REPORT from: here")
        raise OSError("not there")

    with pytest.raises(OSError, match="not there"), without_load_report():
        load()
    assert "LOAD REPORT" in caplog.text


def test_bars_come_back_after_the_block(capfd):
    with without_bars():
        assert list(library.tqdm([1, 2], desc="Loading weights")) == [1, 2]
    assert capfd.readouterr().err == ""
    list(library.tqdm([1, 2], desc="Loading weights"))
    assert "Loading weights" in capfd.readouterr().err


def test_old_names_of_collectives_are_silenced_alone():
    without_old_collectives()
    warnings.warn("`torch.distributed.all_gather` is deprecated.", FutureWarning, stacklevel=1)
    with pytest.raises(FutureWarning):
        warnings.warn("`torch.anything` is deprecated.", FutureWarning, stacklevel=1)
