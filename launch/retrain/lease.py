"""One process at a time: a lock on this machine, a lease with a heartbeat among machines."""

import contextlib
import logging
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from launch.retrain.store import Clock, Store
from pipeline.errors import MasklockError
from pipeline.locking import file_lock

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def held(store: Store, now: Clock, lease_seconds: float) -> Iterator[int]:
    """Be the only one at work; yields the lock's descriptor, for the processes that are started.

    They hold the lock too: the training of a process that was killed keeps others away until it
    ends. A process that dies does not give the lease back; the next one on its machine sees by the
    lock that it is dead, one on another machine waits until it was silent for `lease_seconds`.

    Raises:
        BusyError: another one is at work.
    """
    place = store.path.with_name("lock")
    with file_lock(place, 0.0, f"{store.path.parent}") as descriptor:
        before = store.take(lease_seconds)
        if before is not None:
            logger.info("Took over from %s, which is gone.", before)
        try:
            with _heartbeat(store.path, store.token, now, lease_seconds / 4):
                yield descriptor
        finally:
            store.give_back()


@contextlib.contextmanager
def _heartbeat(path: Path, token: str, now: Clock, every_seconds: float) -> Iterator[None]:
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(every_seconds):
            try:
                with closing(Store(path, now)) as store:  # connections belong to their thread
                    if not store.beat(token):
                        return
            except MasklockError as error:
                logger.warning("No heartbeat this time: %s", error)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
