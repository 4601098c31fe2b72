"""Damages checkpoints as disks and crashes do, and remembers which."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from distrain.checkpoint import format as checkpoint_format
from distrain.checkpoint import retention as checkpoint_retention
from distrain.tools.chaos.plan import Fault

#: Ends of the names of hidden folders that are on their way out.
_PUT_ASIDE = (".replaced", ".removed")


class Checkpoints:
    """The checkpoints of a run, some of them damaged by us.

    What is damaged is remembered here and not found by distrain's own check, which might be what is wrong.

    Args:
        folder: The run's ``checkpoints``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._damaged: dict[str, tuple[int, int]] = {}

    def name_complete(self) -> None:
        """Gives a checkpoint that lacks but its name, as a process killed amid a save may leave it, that name.

        So the next start would; without it what is the newest can't be told.
        """
        for path in self.folder.glob(".step_*"):
            checkpoint_retention.publish(path)

    def newest(self) -> Path | None:
        """The newest one that we have not damaged."""
        whole = [path for path in checkpoint_format.list_checkpoints(self.folder) if not self.is_damaged(path)]
        return whole[-1] if whole else None

    def damaged(self) -> list[Path]:
        """Those that we have damaged and that nobody has replaced or removed."""
        return [path for path in checkpoint_format.list_checkpoints(self.folder) if self.is_damaged(path)]

    def is_damaged(self, path: Path) -> bool:
        """Whether we have damaged this folder, or one that stood here before it."""
        return path.is_dir() and self._damaged.get(path.name) == _identity(path)

    def being_written(self) -> bool:
        """Whether a save has begun and is not complete."""
        return any(path.suffix not in _PUT_ASIDE for path in self.folder.glob(".step_*"))

    def damage(self, fault: Fault) -> str:
        """Damages a file of the newest checkpoint as the fault says, and tells what was done."""
        self.name_complete()
        path = self.newest()
        assert path is not None
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size)
        file = files[int(fault.draws[0] * len(files))]
        told = _DAMAGES[fault.kind](file, *fault.draws[1:])
        self._damaged[path.name] = _identity(path)
        return f"{path.name}/{file.relative_to(path)} {told}"


def truncate(file: Path, place: float, _: float) -> str:
    """Cuts a file at a random length, shorter than it is."""
    size = file.stat().st_size
    kept = int(place * size)
    with file.open("r+b") as opened:
        opened.truncate(kept)
    return f"cut from {size} to {kept} bytes"


def flip_bit(file: Path, place: float, which: float) -> str:
    """Turns one bit of a file."""
    position, bit = int(place * file.stat().st_size), int(which * 8)
    with file.open("r+b") as opened:
        opened.seek(position)
        value = opened.read(1)[0]
        opened.seek(position)
        opened.write(bytes([value ^ (1 << bit)]))
    return f"bit {bit} of byte {position} turned"


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
    # A checkpoint saved again is a new folder, made later; its inode alone might be the old one's.
    status = path.stat()
    return status.st_ino, status.st_mtime_ns
