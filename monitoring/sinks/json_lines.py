"""A file of alerts, one JSON object a line: each alert once, however often it is sent."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.records import append_jsonl, read_jsonl


@dataclass(frozen=True)
class JsonLines:
    """Appends to a file."""

    path: Path

    def __call__(self, alert: Mapping[str, Any]) -> None:
        known = read_jsonl(self.path) if self.path.is_file() else []
        if all(record.get("id") != alert["id"] for record in known):
            append_jsonl(self.path, alert)
