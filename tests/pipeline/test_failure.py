"""Who speaks when several processes fail, with a store in this process."""

import subprocess
import sys

import pytest
import torch

from pipeline import failure
from pipeline.errors import DataError
from pipeline.failure import Company, fail


@pytest.fixture
def both():
    store = torch.distributed.HashStore()
    return Company(store, 0, 2), Company(store, 1, 2)


def test_the_first_to_fail_speaks_and_all_exit_with_its_code(both):
    first, second = both
    said = []
    assert fail(second, DataError("no rows"), said.append) == 2
    assert fail(first, RuntimeError("connection closed"), said.append) == 2
    assert said == ["masklock: no rows"]


def test_a_process_that_is_gone_is_named_instead_of_the_connection_it_broke(both):
    first, second = both
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    second.store.set(second._key("at", 1), f"{failure.socket.gethostname()} {gone.pid}")
    said = []
    assert fail(first, RuntimeError("connection closed by peer"), said.append) == 1
    assert f"process 1 (pid {gone.pid} on" in said[0]
    assert "connection closed" not in said[0]


def test_a_process_that_ended_well_is_not_gone(both):
    first, second = both
    second.store.set(second._key("at", 1), f"{failure.socket.gethostname()} {2**22 + 1}")
    assert first.gone()
    second.depart()
    assert first.gone() == []


def test_a_bug_of_ones_own_is_shown_with_its_place(both, monkeypatch):
    monkeypatch.setattr(failure, "POLL_SECONDS", 0.0)
    said = []
    assert fail(both[0], ValueError("a bug"), said.append) == 1
    assert said[0].endswith("ValueError: a bug")


def test_a_process_alone_fails_as_always(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(DataError), failure.failing_together(print):
        raise DataError("no rows")
    assert not failure.is_ending()


def test_a_good_end_of_several_does_not_wait_for_the_interpreters_own(both, monkeypatch):
    left = []
    monkeypatch.setattr(failure, "_join", lambda environment: both[0])
    monkeypatch.setattr(failure, "_leave", left.append)
    with failure.failing_together(print):
        sys.exit(75)
    assert left == [75]
    both[1].store.set(both[1]._key("at", 0), f"{failure.socket.gethostname()} {2**22 + 1}")
    assert both[1].gone() == []
