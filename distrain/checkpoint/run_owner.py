"""Which start of a run may write into the run's folder.

Two processes may train the same run at once: an agent that was killed left its workers behind, a node was cut off from
the others and continues, or a command was typed twice. Both would write the same files. The later start becomes the
owner of the folder, and the earlier one ends before it saves again.
"""

from __future__ import annotations

import json
import os
import socket
import uuid
from pathlib import Path


class RunOwner:
    """Makes this start the owner of a folder; rank 0 creates it.

    Args:
        folder: The run's ``checkpoints`` folder.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / ".claim"
        self._own_claim = json.dumps({"name": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()})
        folder.mkdir(parents=True, exist_ok=True)
        new = folder / f".claim.{os.getpid()}"
        new.write_text(self._own_claim)
        new.replace(self._file)

    def check(self) -> None:
        """Checks that no later start has become the owner.

        Raises:
            RuntimeError: A later start has; the message names its host and process.
        """
        try:
            claim = self._file.read_text()
        except OSError:
            # The folder was removed, or the file system fails for a moment. Saving reports it if it lasts.
            return
        if claim != self._own_claim:
            raise RuntimeError(f"another start of this run has taken over {self._file.parent}: {claim}")

    def release(self) -> None:
        """Gives up ownership when the run has ended."""
        self.check()
        self._file.unlink(missing_ok=True)
