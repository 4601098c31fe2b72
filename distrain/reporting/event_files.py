"""Removes events from TensorBoard's event files.

An event file is a sequence of records. Each record consists of the event's length as a little-endian uint64, a checksum
of the length, the event (a protocol buffer), and a checksum of the event. Kept records are copied unchanged.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from distrain.files.contained_folder import ContainedFolder
from distrain.files.writing import flush_and_sync

log = logging.getLogger(__name__)

_LENGTH = struct.Struct("<Q")
_CHECKSUM_BYTES = 4


def event_paths(folder: Path) -> list[Path]:
    """The event files in a folder, oldest first."""
    return sorted(folder.glob("events.out.tfevents.*"))


def remove_events(folder: Path, is_valid: Callable[[int, Any], bool]) -> None:
    """Rewrites the files that hold invalid events, and deletes those of which no event with values is left.

    Each file is replaced atomically. A truncated or corrupt record ends its file: it and all that follows is removed.

    Args:
        folder: Folder that holds the event files.
        is_valid: Called with an event's step and each value of its summary (tensorboard's ``Summary.Value``). An event
            is kept if all of its values are valid.
    """
    contained = ContainedFolder(folder.parent)
    for path in event_paths(folder):
        name, new_name = (f"{folder.name}/{file}" for file in (path.name, f".{path.name.replace('tfevents', 'new')}"))
        with contained.open_file(name, "rb") as old, contained.create(new_name) as new:
            size = os.fstat(old.fileno()).st_size
            has_values, read_bytes = False, 0
            for record, event in _records(old, size):
                read_bytes += len(record)
                values = event.summary.value
                if all(is_valid(event.step, value) for value in values):
                    new.write(record)
                    has_values = has_values or bool(values)
            unchanged = new.tell() == size
            flush_and_sync(new)
        if read_bytes < size:
            log.warning(
                "removed everything after byte %d of %s: the record there is truncated or corrupt", read_bytes, path
            )
        if unchanged:
            contained.unlink(new_name)
        elif has_values:
            contained.rename(new_name, name)
        else:
            contained.unlink(name)
            contained.unlink(new_name)


def _records(file: IO[bytes], size: int) -> Iterator[tuple[bytes, Any]]:
    """Yields each complete record with its event, up to the first that is truncated or corrupt."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]

    header_bytes = _LENGTH.size + _CHECKSUM_BYTES
    while len(header := file.read(header_bytes)) == header_bytes:
        (length,) = _LENGTH.unpack(header[: _LENGTH.size])
        if file.tell() + length + _CHECKSUM_BYTES > size:
            return
        body = file.read(length + _CHECKSUM_BYTES)
        try:
            event = Event.FromString(body[:length])
        except DecodeError:
            return
        yield header + body, event
