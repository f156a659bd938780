"""Who may work: the lock of this machine, the lease among machines, what a late process may do."""

import sqlite3
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest

from launch.retrain.lease import held
from launch.retrain.store import Retraining, Store
from pipeline.errors import BusyError, InputError

NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)


class Clock:
    time = NOON

    def __call__(self) -> datetime:
        return self.time


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path, clock):
    made = Store(tmp_path / "state.sqlite", clock)
    yield made
    made.close()


def a_retraining() -> Retraining:
    return Retraining("k" * 64, "manual", {}, "v0001", NOON.isoformat())


def on_another_machine(store: Store) -> None:
    with closing(sqlite3.connect(store.path)) as other, other:
        other.execute("UPDATE holder SET host = 'elsewhere'")


def test_one_on_this_machine_keeps_others_away(store, clock):
    with held(store, clock, 60), pytest.raises(BusyError), held(store, clock, 60):
        pass
    with held(store, clock, 60):
        pass


def test_a_dead_holder_of_this_machine_is_taken_over_at_once(store):
    store.take(60)
    assert store.take(60).startswith("process ")


def test_one_on_another_machine_is_waited_for_until_it_is_silent(store, clock):
    store.take(60)
    on_another_machine(store)
    clock.time += timedelta(seconds=59)
    with pytest.raises(BusyError, match="on elsewhere works on this"):
        store.take(60)
    clock.time += timedelta(seconds=2)
    assert "elsewhere" in store.take(60)


def test_a_heartbeat_keeps_the_lease(store, clock):
    store.take(60)
    on_another_machine(store)
    clock.time += timedelta(seconds=59)
    assert store.beat(store.token)
    clock.time += timedelta(seconds=59)
    with pytest.raises(BusyError):
        store.take(60)


def test_who_lost_the_lease_changes_nothing(store, clock, tmp_path):
    store.take(60)
    one = store.begin(a_retraining())
    later = Store(store.path, clock)
    later.take(60)
    with pytest.raises(BusyError, match="The lease was lost"):
        store.move(one, "rejected")
    assert not store.beat(store.token)
    assert later.retrainings()[0].state == "triggered"
    later.close()


def test_every_change_is_told(store):
    store.take(60)
    one = store.begin(a_retraining())
    store.move(store.move(one, "data checked", "3 rows"), "rejected", "too few")
    told = [(change["state"], change["said"]) for change in store.changes(one.number)]
    assert told == [("triggered", "manual"), ("data checked", "3 rows"), ("rejected", "too few")]


def test_damage_and_later_versions_are_explained(tmp_path, clock):
    (tmp_path / "bad.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(InputError, match="move it aside"):
        Store(tmp_path / "bad.sqlite", clock)
    with closing(sqlite3.connect(tmp_path / "late.sqlite")) as late, late:
        late.execute("PRAGMA user_version = 9")
    with pytest.raises(InputError, match="is of version 9"):
        Store(tmp_path / "late.sqlite", clock)


def test_a_holder_at_work_is_heard_of(store, clock):
    with held(store, clock, lease_seconds=0.2):
        clock.time += timedelta(hours=1)
        for _ in range(200):
            with closing(sqlite3.connect(store.path)) as other:
                (seen,) = other.execute("SELECT seen FROM holder").fetchone()
            if seen == clock.time.isoformat():
                return
            time.sleep(0.02)
    pytest.fail("no heartbeat")
