"""TensorBoard's event files without what a run that goes on has left behind.

A file is a row of records: the length of an event as a little-endian uint64, its checksum, the event (a protocol
buffer), its checksum. What is kept is copied as it is.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

log = logging.getLogger(__name__)

_LENGTH = struct.Struct("<Q")
_CHECKSUM_BYTES = 4


def event_paths(folder: Path) -> list[Path]:
    """The event files, oldest first."""
    return sorted(folder.glob("events.out.tfevents.*"))


def remove_events(folder: Path, belongs: Callable[[int, Any], bool]) -> None:
    """Rewrites the files that hold what doesn't belong to the run any more, each in one step.

    A record that was cut short by a process that died ends its file.

    Args:
        folder: Where the files lie.
        belongs: Is given a step and a value of that step's summary (tensorboard's ``Summary.Value``).
    """
    for path in event_paths(folder):
        new = folder / f".{path.name.replace('tfevents', 'new')}"
        with path.open("rb") as old, new.open("wb") as kept:
            size = os.fstat(old.fileno()).st_size
            says_something, read = False, 0
            for record, event in _records(old, size):
                read += len(record)
                values = event.summary.value
                if all(belongs(event.step, value) for value in values):
                    kept.write(record)
                    says_something = says_something or bool(values)
            unchanged = kept.tell() == size
            kept.flush()
            os.fsync(kept.fileno())
        if read < size:
            log.warning("left out what stands in %s after byte %d: it is no event, or was cut short", path, read)
        if unchanged:
            new.unlink()
        elif says_something:
            new.replace(path)
        else:
            path.unlink()
            new.unlink()


def _records(file: BinaryIO, size: int) -> Iterator[tuple[bytes, Any]]:
    """Each whole record with its event; the first that is none ends the row."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]

    head_bytes = _LENGTH.size + _CHECKSUM_BYTES
    while len(head := file.read(head_bytes)) == head_bytes:
        (length,) = _LENGTH.unpack(head[: _LENGTH.size])
        if file.tell() + length + _CHECKSUM_BYTES > size:
            return
        body = file.read(length + _CHECKSUM_BYTES)
        try:
            event = Event.FromString(body[:length])
        except DecodeError:
            return
        yield head + body, event
