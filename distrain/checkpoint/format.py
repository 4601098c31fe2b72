"""The folder of a checkpoint: its files, their names, and the error for a folder that does not hold them.

A checkpoint is a folder ``step_XXXXXXXX`` of safetensors files, keyed by the unsplit model's parameter names, and JSON:

============================  ========================================================================================
``model.safetensors``         parameters and buffers
``optimizer.safetensors``     the optimizer's tensors as ``<parameter>/<state name>``
``average.safetensors``       averages of the model as ``ema/<name>`` and ``swa/<name>``; only of a run that keeps some
``rank_XXXXX.safetensors``    the state of one rank only, such as its residuals, as ``<part>/<state name>/<parameter>``
``state.json``                position in the data, step, best metric, scalars, the layout of the ranks that saved, and
                              what is known of the data;
                              :mod:`~distrain.checkpoint.state_schema` says what it may hold
``manifest.json``             size and SHA-256 of each other file; written last
============================  ========================================================================================

Where several ranks hold parts of the model, each rank writes its own files, such as ``model_XXXXX.safetensors`` and
``optimizer_XXXXX.safetensors`` with the rank's number. Nothing is gathered: a tensor is in one of them, or, where ranks
share its elements, a slice of it in several; see :mod:`~distrain.checkpoint.saved_tensors`.

A checkpoint is either complete or absent. :mod:`~distrain.checkpoint.writer` writes it into a hidden temporary folder
beside the others and renames that folder when it is complete; :mod:`~distrain.checkpoint.reader` compares every file
with the manifest before it is used. Tensors are in safetensors and the rest is JSON, so reading one never runs code.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable
from pathlib import Path

#: Parts of the unsplit state. Each element of their tensors is saved by exactly one rank.
PARTS = ("model", "optimizer", "average")
#: Those that a checkpoint may lack.
OPTIONAL_PARTS = ("average",)
#: Averages of the model that a checkpoint may hold.
AVERAGES = ("ema", "swa")
#: Parts that every rank has for itself.
PER_RANK_PARTS = ("compressor", "local")
#: Largest JSON file of a checkpoint that is read, in bytes.
MAX_JSON_BYTES = 1 << 26
#: Name of a checkpoint's folder. Group: the step.
CHECKPOINT_NAME = re.compile(r"step_([0-9]{8}|[1-9][0-9]{8,})")
#: A hidden folder that is being written, replaced or removed. Groups: the checkpoint's name, the host and process id of
#: the rank 0 that made it, and the purpose (nothing for a folder that is being written).
TEMPORARY_NAME = re.compile(r"\.(step_[0-9]{8,})\.(?:(.+)\.)?([0-9]+)(\.replaced|\.removed)?")


class DamagedCheckpoint(ValueError):
    """A checkpoint is incomplete or differs from its manifest; the message names the file."""


def unreadable(path: Path, error: OSError) -> DamagedCheckpoint:
    """The error for a checkpoint that the file system does not give.

    Args:
        path: What was read; named if the error names no file.
        error: What the file system said.
    """
    return DamagedCheckpoint(f"{error.filename or path} can't be read ({error.strerror or error})")


def checkpoints_folder(run_dir: Path) -> Path:
    """The folder that holds a run's checkpoints."""
    return run_dir / "checkpoints"


def checkpoint_path(folder: Path, step: int) -> Path:
    """The path of a step's checkpoint in a ``checkpoints`` folder."""
    return folder / f"step_{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a ``checkpoints`` folder, oldest first; empty if there is no such folder.

    Raises:
        OSError: The folder can't be read. That must not look like a folder without checkpoints.
    """
    try:
        paths = list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    named = ((CHECKPOINT_NAME.fullmatch(path.name), path) for path in paths)
    return [path for _, path in sorted((int(name[1]), path) for name, path in named if name and _is_folder(path))]


def step_of(checkpoint: Path) -> int:
    """The step that the name of a checkpoint's folder says."""
    return int(checkpoint.name.removeprefix("step_"))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # the disk fails; reading the checkpoint says so
        return True


def temporary_path(checkpoint: Path) -> Path:
    """Where this process writes a checkpoint before it is complete."""
    return checkpoint.with_name(f".{checkpoint.name}.{socket.gethostname()}.{os.getpid()}")


def per_rank_file(rank: int) -> str:
    """Name of the file that holds the state of one rank only."""
    return f"rank_{rank:05d}.safetensors"


def part_files(part: str, names: Iterable[str]) -> list[str]:
    """Those of the given file names that hold a part: one file, or one file of each rank that held some of it."""
    return sorted(name for name in names if re.fullmatch(rf"{part}(_\d{{5,}})?\.safetensors", name))
