"""Writes TensorBoard's event files from the thread that logs.

TensorBoard's own writer has a thread that ends at the first error of the disk, with a traceback on the terminal, and
writes nothing afterwards. Importing this module is slow, since it imports TensorBoard.
"""

from __future__ import annotations

import itertools
import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c  # type: ignore[import-untyped]
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.writer import FileWriter
from typing_extensions import override

from distrain.files.appending import AppendedFile
from distrain.files.contained_folder import ContainedFolder

_VERSION = "brain.Event:2"
#: Tells the files apart that this process opens within a second.
_FILE_NUMBERS = itertools.count()


class EventWriter(SummaryWriter):
    """A ``SummaryWriter`` that holds events in memory until :meth:`flush`, which alone can raise an ``OSError``.

    Args:
        folder: The folder of event files.
        purge_step: A running TensorBoard discards its events from this step on; ``None`` for no such mark.
        may_create: As for :class:`~distrain.files.appending.AppendedFile`.
    """

    def __init__(self, folder: Path, purge_step: int | None, may_create: Callable[[], bool]) -> None:
        number = next(_FILE_NUMBERS)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{number}"
        self._event_file = _EventFile(AppendedFile(ContainedFolder(folder.parent), f"{folder.name}/{name}", may_create))
        super().__init__(str(folder), purge_step=purge_step)

    @override
    def _get_file_writer(self) -> Any:
        if self.file_writer is None:
            # Its own initialisation would open a file and start the thread.
            writer: Any = FileWriter.__new__(FileWriter)
            writer.event_writer = self._event_file
            both: Any = self
            both.file_writer, both.all_writers = writer, {self.log_dir: writer}
            self._event_file.add_event(Event(wall_time=time.time(), file_version=_VERSION))
            if self.purge_step is not None:
                step, self.purge_step = self.purge_step, None
                start = SessionLog(status=SessionLog.START)
                self._event_file.add_event(Event(wall_time=time.time(), step=step, file_version=_VERSION))
                self._event_file.add_event(Event(wall_time=time.time(), step=step, session_log=start))
        return self.file_writer


class _EventFile:
    """An event file, with the methods of TensorBoard's ``EventFileWriter`` that torch calls."""

    def __init__(self, file: AppendedFile) -> None:
        self._file = file

    def get_logdir(self) -> str:
        """The folder of the file."""
        return str(self._file.path.parent)

    def add_event(self, event: Any) -> None:
        """Holds an event; see :mod:`distrain.reporting.event_files` for the format of a record."""
        content: bytes = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, content)]
        self._file.hold(length + checksums[0] + content + checksums[1])

    def reopen(self) -> None:
        """Does nothing: the file opens itself."""

    def flush(self) -> None:
        """Writes the events that are held."""
        self._file.flush()

    def close(self) -> None:
        """Writes the events that are held, and closes the file."""
        self._file.close()
