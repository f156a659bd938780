"""Seconds of one call, by the clock on the wall or by what the processor did for this process."""

import time
from collections.abc import Callable
from typing import Any


def wall_seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def cpu_seconds(function: Callable[[], Any]) -> float:
    """Other programs on the machine hardly change it; threads of one process add up."""
    start = time.process_time()
    function()
    return time.process_time() - start
