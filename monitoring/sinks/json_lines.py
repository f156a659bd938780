"""A file of alerts, one JSON object a line: each alert once, also if it is sent again."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.records import append_jsonl

SEARCHED_BYTES = 8 * 2**20
"""An alert is sent again right after a crash: it is looked for among the newest lines."""


@dataclass(frozen=True)
class JsonLines:
    """Appends to a file."""

    path: Path

    def __call__(self, alert: Mapping[str, Any]) -> None:
        if not self._holds(alert["id"]):
            append_jsonl(self.path, alert)

    def _holds(self, id: str) -> bool:
        """Whether a whole line, one with its newline, is about this alert."""
        if not self.path.is_file():
            return False
        with open(self.path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - SEARCHED_BYTES))
            whole, _, _ = file.read().rpartition(b"\n")
        return f'"id": "{id}"'.encode() in whole
