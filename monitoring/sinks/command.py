"""A program started with each alert as JSON on its standard input; no shell in between."""

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from monitoring.sinks import DeliveryError


@dataclass(frozen=True)
class Command:
    """Starts `argv`; an exit code other than 0, or no end in time, is a failed delivery."""

    argv: Sequence[str]
    timeout_seconds: float

    def __call__(self, alert: Mapping[str, Any]) -> None:
        name = self.argv[0]
        try:
            process = subprocess.Popen(
                self.argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # so that its own children end with it
            )
        except OSError as error:
            raise DeliveryError(f"{name} could not be started: {error.strerror}") from None
        try:
            process.communicate(json.dumps(alert).encode(), timeout=self.timeout_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise DeliveryError(f"{name} did not end in {self.timeout_seconds:g} s") from None
        if process.returncode:
            raise DeliveryError(f"{name} ended with exit code {process.returncode}")
