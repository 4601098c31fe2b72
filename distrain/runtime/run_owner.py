"""Which start of a run may write into the run's folder, and what happens if the folder is removed.

Two processes may train the same run at once: an agent that was killed left its workers behind, a node was cut off from
the others and continues, or a command was typed twice. Both would write the same files. The later start becomes the
owner of the folder: it puts its claim there. From then on the earlier one writes nothing into it, and ends.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import json
import logging
import os
import socket
import uuid
from pathlib import Path, PurePosixPath

from distrain.errors import TakenOver
from distrain.files.contained_folder import ContainedFolder

log = logging.getLogger(__name__)

#: The file that names the owner, below a run's folder.
CLAIM = PurePosixPath("checkpoints", ".claim")
_MAX_CLAIM_BYTES = 1 << 16


class FolderState(enum.Enum):
    """Whose a run's folder is."""

    OURS = "this start may write"
    REMOVED = "the folder was removed, and may be made anew"
    TAKEN = "the folder belongs to another start, or is another folder"


class RunOwner:
    """This start as the owner of the run's folder. Rank 0 makes it; the other ranks get a copy of it.

    Args:
        run_dir: The run's folder.
        claim: What this start writes into the claim file.
        earlier: What the claim file held before; ``None`` if there was none, empty if it could not be read.

    Attributes:
        run_dir: As given.
    """

    def __init__(self, run_dir: Path, claim: str, earlier: str | None) -> None:
        self.run_dir = run_dir
        self._claim, self._earlier = claim, earlier
        self._folder, self._file = ContainedFolder(run_dir), claim_path(run_dir)
        self._taken_by: str | None = None
        self._kept: dict[str, str] = {}
        self._identity = _identity(run_dir)
        # A rank whose host doesn't see rank 0's folder never finds the claim, which says nothing then.
        self._was_claimed = False
        with contextlib.suppress(OSError):
            self._was_claimed = _read_claim(self._folder) == claim

    @classmethod
    def take(cls, run_dir: Path) -> RunOwner:
        """Makes this start the owner; a claim that can't be written is named in the log."""
        claim = json.dumps({"name": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()})
        earlier: str | None
        try:
            earlier = _read_claim(ContainedFolder(run_dir))
        except (FileNotFoundError, NotADirectoryError):
            earlier = None
        except (OSError, UnicodeDecodeError):
            earlier = ""
        owner = cls(run_dir, claim, earlier)
        owner._write_claim()
        return owner

    def to_json(self) -> str:
        """Encodes the owner for the other ranks."""
        return json.dumps([str(self.run_dir), self._claim, self._earlier])

    @classmethod
    def from_json(cls, text: str | bytes) -> RunOwner:
        """The owner that rank 0 encoded."""
        run_dir, claim, earlier = json.loads(text)
        return cls(Path(run_dir), claim, earlier)

    def state(self) -> FolderState:
        """Whose the folder is now; once it was taken, it stays taken."""
        if self._taken_by is not None:
            return FolderState.TAKEN
        try:
            claim = _read_claim(self._folder)
        except (FileNotFoundError, NotADirectoryError):
            return self._state_without_claim()
        except (OSError, UnicodeDecodeError):
            # The file system fails for a moment. Saving reports it if it lasts.
            return FolderState.OURS
        if claim == self._claim:
            self._was_claimed = True
            return FolderState.OURS
        if not self._was_claimed and self._earlier in (claim, ""):
            self._earlier = claim
            return FolderState.OURS
        self._taken_by = f"another start of this run has taken over {self.run_dir}: {claim}"
        return FolderState.TAKEN

    def _state_without_claim(self) -> FolderState:
        if not self._was_claimed:
            return FolderState.OURS
        if _identity(self.run_dir) in (None, self._identity):
            return FolderState.REMOVED
        if self._is_used():
            self._taken_by = f"the run folder {self.run_dir} was removed, and another one is in its place"
            return FolderState.TAKEN
        return FolderState.REMOVED

    def _is_used(self) -> bool:
        """Whether the folder holds what another run wrote.

        What this start may make anew while the folder is removed counts as nothing: log files, and the hidden folder of
        a checkpoint that is written in the background.
        """
        if any(self.run_dir.joinpath(name).exists() for name in ("config.yaml", "metrics.jsonl")):
            return True
        try:
            return not all(name.startswith(".") for name in self._folder.names(CLAIM.parent.name))
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # a link to elsewhere, or a folder that can't be read: certainly not made by this start
            return True

    @property
    def may_write(self) -> bool:
        """Whether the folder is this start's, so that files in it may be written."""
        return self.state() is FolderState.OURS

    @property
    def is_taken(self) -> bool:
        """Whether this start must write nothing more into the folder."""
        return self.state() is FolderState.TAKEN

    def check(self) -> None:
        """Checks that the folder was not taken.

        Raises:
            TakenOver: It was; the message names the owner's host and process.
        """
        if self.is_taken:
            raise TakenOver(str(self._taken_by))

    def write_kept(self, name: str, content: str) -> None:
        """Writes a small file of the folder atomically, and keeps its content for :meth:`restore`.

        Raises:
            TakenOver: The folder was taken.
            OSError: The file can't be written.
        """
        self.check()
        self._kept[name] = content
        self._folder.replace_text(name, content)

    def restore(self) -> None:
        """Makes the folder anew if it was removed, with the claim and the kept files; called by rank 0.

        Raises:
            TakenOver: The folder was taken.
            OSError: It can't be made.
        """
        self.check()
        if not self._was_claimed:
            self._write_claim()
        missing = [name for name in self._kept if not self.run_dir.joinpath(name).is_file()]
        if self.state() is FolderState.REMOVED:
            log.warning("THE RUN FOLDER WAS REMOVED: %s. It is written anew", self.run_dir)
            self._folder.make_folder(CLAIM.parent.name)
            self._folder.replace_text(str(CLAIM), self._claim)
        self._identity = _identity(self.run_dir)
        for name in missing:
            self._folder.replace_text(name, self._kept[name])
            log.warning("%s was removed and is written anew", self.run_dir / name)

    def is_complete(self) -> bool:
        """Whether the folder is this start's and has the kept files."""
        return self.may_write and all(self.run_dir.joinpath(name).is_file() for name in self._kept)

    def release(self) -> None:
        """Gives up ownership when this start has ended, and removes its claim; called by rank 0."""
        if not self._was_claimed or not self.may_write:
            return
        self._was_claimed = False
        try:
            self._folder.unlink(str(CLAIM), missing_ok=True)
            # Of a start that saved nothing.
            self._folder.remove_folder(CLAIM.parent.name)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                log.warning("%s stays: %s", self._file, error.strerror)

    def _write_claim(self) -> None:
        try:
            self._folder.make_folder(CLAIM.parent.name)
            self._folder.replace_text(str(CLAIM), self._claim)
            self._was_claimed = True
        except OSError as error:
            log.warning(
                "%s can't be written (%s), so another start of this run would not be noticed",
                self._file,
                error.strerror,
            )


def claim_path(run_dir: Path) -> Path:
    """The file that names the owner of a run's folder."""
    return run_dir / CLAIM


def _read_claim(folder: ContainedFolder) -> str:
    with folder.open_file(str(CLAIM), "rb") as file:
        return file.read(_MAX_CLAIM_BYTES).decode()


def _identity(folder: Path) -> tuple[int, int] | None:
    """Device and inode of a folder; ``None`` if it is missing or can't be looked at."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
