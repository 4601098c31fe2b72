"""Which start of a run writes its folder.

An agent that is killed leaves its workers behind, a node that is cut off goes on by itself, a command is typed twice:
then two starts of one run would write the same files. The later one takes the folder over, and the earlier one ends
before it saves again.
"""

from __future__ import annotations

import json
import os
import socket
import uuid
from pathlib import Path


class Claim:
    """A start's claim on a folder, made by its rank 0.

    Args:
        folder: The run's ``checkpoints`` folder.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / ".claim"
        self._mine = json.dumps({"name": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()})
        folder.mkdir(parents=True, exist_ok=True)
        new = folder / f".claim.{os.getpid()}"
        new.write_text(self._mine)
        new.replace(self._file)

    def check(self) -> None:
        """Makes sure that no later start has claimed the folder.

        Raises:
            RuntimeError: One has; it says where.
        """
        try:
            found = self._file.read_text()
        except OSError:
            # Gone with its folder, or a file system out of breath: saving will tell.
            return
        if found != self._mine:
            raise RuntimeError(f"another start of this run has taken over {self._file.parent}: {found}")

    def release(self) -> None:
        """The run has ended; nobody writes any more."""
        self.check()
        self._file.unlink(missing_ok=True)
