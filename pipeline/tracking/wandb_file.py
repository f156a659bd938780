"""Counts what really is in the file of a Weights & Biases run, or at its server, without wandb.

The file is a log in LevelDB's format (blocks of 32 KiB; a 7-byte header of its own) of protobuf
`Record` messages, of which field 2 is a row of history.
"""

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path

_BLOCK_BYTES = 32 * 1024
_FILE_HEADER_BYTES = 7
_PIECE_HEADER = struct.Struct("<IHB")  # checksum, length, kind
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_HISTORY_FIELD = 2
_LENGTH_DELIMITED = 2
_FILE_STREAM = "filestream:"
_MEDIA = re.compile(rb'"(image|table)-file"')


def num_history_rows(path: str | Path) -> int:
    """Rows of numbers; those of pictures and tables are not counted. A torn end is passed over."""
    return sum(_MEDIA.search(record) is None for record in _history(path))


def num_history_records(path: str | Path) -> int:
    """Everything in the history: rows of numbers, pictures, curves and tables."""
    return sum(1 for _ in _history(path))


def num_confirmed_lines(log: str | Path) -> int:
    """Lines of history that the server has confirmed, from the log of wandb's own service.

    wandb says "sending" with the number of lines, then "sent" once the server has said OK; one
    request at a time. It repeats what was not confirmed, so these are the first lines of the run.
    """
    confirmed = waiting = 0
    for line in Path(log).read_text(encoding="utf-8", errors="replace").splitlines():
        if _FILE_STREAM not in line:
            continue
        message = json.loads(line)
        if message["msg"] == f"{_FILE_STREAM} sending request":
            waiting = message.get("history_lines", 0)
        elif message["msg"] == f"{_FILE_STREAM} request sent" and message["status"] == "200 OK":
            confirmed, waiting = confirmed + waiting, 0
    return confirmed


def _history(path: str | Path) -> Iterator[bytes]:
    return filter(_is_history, _records(Path(path).read_bytes()))


def _records(data: bytes) -> Iterator[bytes]:
    parts: list[bytes] = []
    for kind, piece in _pieces(data):
        if kind in (_WHOLE, _FIRST):
            parts = []
        parts.append(piece)
        if kind in (_WHOLE, _LAST):
            yield b"".join(parts)


def _pieces(data: bytes) -> Iterator[tuple[int, bytes]]:
    position = _FILE_HEADER_BYTES
    while position + _PIECE_HEADER.size <= len(data):
        left_in_block = _BLOCK_BYTES - position % _BLOCK_BYTES
        if left_in_block < _PIECE_HEADER.size:
            position += left_in_block
            continue
        _, length, kind = _PIECE_HEADER.unpack_from(data, position)
        position += _PIECE_HEADER.size
        if not _WHOLE <= kind <= _LAST or position + length > len(data):
            return
        yield kind, data[position : position + length]
        position += length


def _is_history(record: bytes) -> bool:
    """Whether one of the message's fields is number 2 (walks the top level only)."""
    position = 0
    while position < len(record):
        tag, position = _varint(record, position)
        field, wire_type = tag >> 3, tag & 7
        if (field, wire_type) == (_HISTORY_FIELD, _LENGTH_DELIMITED):
            return True
        value, position = _varint(record, position)
        if wire_type == _LENGTH_DELIMITED:
            position += value
    return False


def _varint(record: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = record[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
