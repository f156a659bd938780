"""When one process of several fails, all end soon, and the cause is said once.

Processes write to the launcher's store; a thread of each reads it, and ends its own process even
where the main thread waits in a collective for one that is gone.
"""

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil

from pipeline.errors import MasklockError

POLL_SECONDS = 0.5
EXIT_CODE_FILE = "MASKLOCK_EXIT_CODE_FILE"
GRACE_SECONDS = 5.0
"""Time for a process to end by itself after another has failed."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Company:
    """The processes that run together, as one of them sees them through the launcher's store."""

    store: Any
    rank: int
    world_size: int

    def arrive(self) -> None:
        """Say where this process lives."""
        self.store.set(self._key("at", self.rank), f"{socket.gethostname()} {os.getpid()}")

    def depart(self) -> None:
        """Say that this process ends as it should."""
        self.store.set(self._key("done", self.rank), "1")

    def claim(self, code: int) -> bool:
        """Whether this process is the first to fail, and so the one to say why."""
        is_first = bool(self.store.add(self._key("failures", "count"), 1) == 1)
        if is_first:
            self.store.set(self._key("failures", "code"), str(code))
        return is_first

    def failed_with(self) -> int | None:
        """The exit code of the process that failed first, if one has."""
        key = self._key("failures", "code")
        return int(self.store.get(key)) if self.store.check([key]) else None

    def gone(self) -> list[str]:
        """Processes of this machine that ended without a word."""
        found = []
        for rank in range(self.world_size):
            at, done = self._key("at", rank), self._key("done", rank)
            if rank == self.rank or not self.store.check([at]) or self.store.check([done]):
                continue
            host, pid = self.store.get(at).decode().split()
            if host == socket.gethostname() and not _is_alive(int(pid)):
                found.append(f"process {rank} (pid {pid} on {host})")
        return found

    def _key(self, kind: str, name: int | str) -> str:
        return f"masklock/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{kind}/{name}"


@contextmanager
def failing_together(say: Say) -> Iterator[None]:
    """Run the block so that its failure, on any process, ends all of them with one message."""
    company = _join(os.environ)
    if company is None:
        yield
        return
    company.arrive()
    is_over = threading.Event()
    watch = threading.Thread(target=_watch, args=(company, say, is_over), daemon=True)
    watch.start()
    try:
        with _hearing_the_launcher(company, say):
            yield
        company.depart()
    except BaseException as error:
        if not _is_good_end(error):
            _leave(fail(company, error, say))
        company.depart()
        _tell_launcher(error)
        _leave(_code_of(error))
    finally:
        is_over.set()


@contextmanager
def _hearing_the_launcher(company: Company, say: Say) -> Iterator[None]:
    """The launcher ends the others by SIGTERM once one has ended: the cause is still to be said."""

    def on_signal(number: int, frame: Any) -> None:
        if not is_ending(company):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        _leave(fail(company, RuntimeError("stopped by the launcher"), say))

    _companies.append(company)
    try:
        before = signal.signal(signal.SIGTERM, on_signal)
        yield
        signal.signal(signal.SIGTERM, before)
    finally:
        _companies.remove(company)


_companies: list[Company] = []


def is_ending(company: Company | None = None) -> bool:
    """Whether another process has failed or gone, so that this one is about to end too."""
    company = company or (_companies[-1] if _companies else None)
    return company is not None and (company.failed_with() is not None or bool(company.gone()))


def fail(company: Company, error: BaseException, say: Say) -> int:
    """Say why, unless another process failed first or is the cause; the code to exit with."""
    if not isinstance(error, MasklockError):
        for _ in range(4):  # a broken connection is often heard of before its cause
            if company.failed_with() is not None or company.gone():
                break
            time.sleep(POLL_SECONDS)
    gone = company.gone() if company.failed_with() is None else []
    code = company.failed_with() or getattr(error, "exit_code", 1) or 1
    if company.claim(code):
        say(_cause(error, gone))
    return company.failed_with() or code


def _is_good_end(error: BaseException) -> bool:
    """Whether an exception is the way of a command line to end with 0, or 75: stopped and saved."""
    return not isinstance(error, MasklockError) and _code_of(error) in (0, 75)


def _code_of(error: BaseException) -> Any:
    """The exit code that an exception stands for, of a command line or of the interpreter."""
    return getattr(error, "exit_code", getattr(error, "code", None))


def _tell_launcher(error: BaseException) -> None:
    """A launcher that passed a signal on does not look at exit codes: 75 goes through a file."""
    code = _code_of(error)
    if code and (name := os.environ.get(EXIT_CODE_FILE)):
        Path(name).write_text(str(code))


def _cause(error: BaseException, gone: list[str]) -> str:
    if isinstance(error, MasklockError):
        return f"masklock: {error}"
    if gone:
        return (
            f"masklock: {' and '.join(gone)} ended without a word: killed, perhaps for lack of "
            "memory. All others stopped. Run the same command again to go on from the newest "
            "checkpoint."
        )
    return "".join(traceback.format_exception(error)).rstrip()


def _watch(company: Company, say: Say, is_over: threading.Event) -> None:
    """End this process soon after another has failed or gone."""
    while not is_over.wait(POLL_SECONDS):
        try:
            gone = company.gone()
            code = company.failed_with()
        except Exception:  # the launcher, which keeps the store, is gone
            gone, code = ["the launcher"], None
        if code is None and not gone:
            continue
        if is_over.wait(GRACE_SECONDS):
            return
        try:
            if gone and company.claim(1):
                say(_cause(RuntimeError(), gone))
        finally:
            _leave(code or 1)


def _leave(code: int) -> None:
    """End at once, without the interpreter's own end.

    After a failure, what lies in a collective cannot be interrupted, and must not be waited for.
    After a good end, a thread of gloo that lets go of a tensor's Python object while the
    interpreter ends would abort the process ("terminate called without an active exception").
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _join(environment: Mapping[str, str]) -> Company | None:
    """The company that torchrun or accelerate has set up; None alone, or under another launcher."""
    world_size = environment.get("WORLD_SIZE", "1")
    has_store = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not has_store or not world_size.isdigit() or int(world_size) < 2:
        return None
    from torch._C._distributed_c10d import TCPStore

    store = TCPStore(
        environment["MASTER_ADDR"],
        int(environment["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=20),
    )
    return Company(store, int(environment["RANK"]), int(world_size))


def _is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
