"""Damages checkpoints as failing disks and crashes do, and remembers which ones were damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from distrain.checkpoint import format as checkpoint_format
from distrain.checkpoint import retention as checkpoint_retention
from distrain.tools.chaos.plan import Fault

#: Suffixes of hidden folders that hold checkpoints about to be deleted.
_DISCARDED_SUFFIXES = (".replaced", ".removed")


class CheckpointTracker:
    """The checkpoints of a run, some of which this object has damaged.

    Damage is remembered here instead of being detected by distrain's own verification, which is itself under test.

    Args:
        folder: The run's folder ``checkpoints``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._damaged: dict[str, tuple[int, int]] = {}

    def publish_complete(self) -> None:
        """Renames complete temporary folders to their final names.

        A process that is killed during a save may leave such a folder, and the next start would publish it. Doing so
        now makes the newest checkpoint known before that start.
        """
        for path in self.folder.glob(".step_*"):
            checkpoint_retention.publish(path)

    def newest_intact(self) -> Path | None:
        """The newest checkpoint that was not damaged here."""
        intact = [path for path in checkpoint_format.list_checkpoints(self.folder) if not self.is_damaged(path)]
        return intact[-1] if intact else None

    def damaged(self) -> list[Path]:
        """The checkpoints damaged here that have been neither replaced nor removed since."""
        return [path for path in checkpoint_format.list_checkpoints(self.folder) if self.is_damaged(path)]

    def is_damaged(self, path: Path) -> bool:
        """Whether this very folder was damaged here; false for a new checkpoint of the same name."""
        return path.is_dir() and self._damaged.get(path.name) == _identity(path)

    def save_in_progress(self) -> bool:
        """Whether a save has begun and is not complete."""
        return any(path.suffix not in _DISCARDED_SUFFIXES for path in self.folder.glob(".step_*"))

    def damage(self, fault: Fault) -> str:
        """Damages a file of the newest intact checkpoint.

        Args:
            fault: Says what to do; its draws choose the file and the position.

        Returns:
            A description of the damage.

        Raises:
            FileNotFoundError: There is no intact checkpoint.
        """
        self.publish_complete()
        path = self.newest_intact()
        if path is None:
            raise FileNotFoundError(f"{self.folder} has no intact checkpoint")
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size)
        file = files[int(fault.draws[0] * len(files))]
        description = _DAMAGES[fault.kind](file, *fault.draws[1:])
        self._damaged[path.name] = _identity(path)
        return f"{path.name}/{file.relative_to(path)} {description}"


def truncate(file: Path, place: float, _: float) -> str:
    """Truncates a file to the share ``place`` (in [0, 1)) of its length."""
    size = file.stat().st_size
    remaining = int(place * size)
    with file.open("r+b") as opened:
        opened.truncate(remaining)
    return f"truncated from {size} to {remaining} bytes"


def flip_bit(file: Path, place: float, which: float) -> str:
    """Flips one bit of a file; ``place`` and ``which`` (in [0, 1)) choose the byte and the bit."""
    position, bit = int(place * file.stat().st_size), int(which * 8)
    with file.open("r+b") as opened:
        opened.seek(position)
        value = opened.read(1)[0]
        opened.seek(position)
        opened.write(bytes([value ^ (1 << bit)]))
    return f"bit {bit} of byte {position} flipped"


def delete_file(file: Path, _: float, __: float) -> str:
    """Deletes a file."""
    file.unlink()
    return "deleted"


_DAMAGES: dict[str, Callable[[Path, float, float], str]] = {
    "truncate": truncate,
    "flip_bit": flip_bit,
    "delete_file": delete_file,
}


def _identity(path: Path) -> tuple[int, int]:
    # A checkpoint that is saved again is a new folder with a later time; the inode alone might be reused.
    status = path.stat()
    return status.st_ino, status.st_mtime_ns
