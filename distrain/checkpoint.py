"""Checkpoints: complete or absent, checked before use, readable by anybody, and never able to run code.

A checkpoint is a folder ``step_XXXXXXXX`` of safetensors files, keyed by the unsplit model's parameter names, and JSON:

==========================  ==========================================================================================
``model.safetensors``       parameters and buffers
``optimizer.safetensors``   the optimizer's tensors as ``<parameter>/<what>``
``compressor.safetensors``  what the compressor keeps
``state.json``              position in the data, step, best metric, scalars
``manifest.json``           size and SHA-256 of each of the others; written last
==========================  ==========================================================================================
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from distrain.runtime import write_json

log = logging.getLogger(__name__)

_PARTS = ("model", "optimizer", "compressor")


class DamagedCheckpoint(ValueError):
    """A checkpoint is incomplete or differs from its manifest; the message names the file."""


def save(folder: Path, state: Mapping[str, Any], progress: Mapping[str, Any]) -> Path:
    """Writes a checkpoint beside the others and then, in one step, makes it visible.

    Args:
        folder: The run's ``checkpoints`` folder.
        state: A strategy's ``state_dict()``.
        progress: The trainer's position; ``step`` names the checkpoint.

    Returns:
        The checkpoint's folder.
    """
    final = folder / f"step_{int(progress['step']):08d}"
    temporary = folder / f".{final.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for part in _PARTS:
        save_file(_plain(state[part]), temporary / f"{part}.safetensors")
    write_json(temporary / "state.json", {"progress": dict(progress), "scalars": state["scalars"]})
    files = sorted(path for path in temporary.iterdir())
    write_json(
        temporary / "manifest.json",
        {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files},
    )
    for path in temporary.iterdir():
        _sync(path)
    _sync(temporary)
    # The same step saved again (a resumed run): the old one moves away whole, since a rename needs the name free and
    # a folder that is being deleted must not be taken for a checkpoint.
    replaced = folder / f"{temporary.name}.replaced"
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    _sync(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def load(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a checkpoint after checking it against its manifest.

    Returns:
        ``(state, progress)`` as :func:`save` was given them; tensors on the CPU.

    Raises:
        DamagedCheckpoint: A file is missing, cut, or changed.
    """
    verify(path)
    state: dict[str, Any] = {}
    try:
        held = json.loads((path / "state.json").read_text())
        state["scalars"], progress = dict(held["scalars"]), dict(held["progress"])
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedCheckpoint(f"{path / 'state.json'} can't be read") from error
    for part in _PARTS:
        state[part] = _load_tensors(path / f"{part}.safetensors")
    return state, progress


def load_model(path: Path) -> dict[str, Tensor]:
    """The model's tensors alone, checked like :func:`load` does."""
    verify(path)
    return _load_tensors(path / "model.safetensors")


def verify(path: Path) -> None:
    """Compares every file with the manifest.

    Raises:
        DamagedCheckpoint: Names the first file that differs.
    """
    manifest_path = path / "manifest.json"
    try:
        manifest = json.loads(manifest_path.read_text())
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest.items()}
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{manifest_path} is missing") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DamagedCheckpoint(f"{manifest_path} can't be read") from None
    for name in [*(f"{part}.safetensors" for part in _PARTS), "state.json"]:
        file = path / name
        if name not in expected:
            raise DamagedCheckpoint(f"{manifest_path} doesn't list {name}")
        if not file.is_file():
            raise DamagedCheckpoint(f"{file} is missing")
        size, digest = expected[name]
        if file.stat().st_size != size:
            raise DamagedCheckpoint(f"{file} has {file.stat().st_size} bytes, not {size}")
        if _sha256(file) != digest:
            raise DamagedCheckpoint(f"{file} differs from its checksum")


def all_in(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir() and path.name[5:].isdigit())


def newest_valid(folder: Path) -> Path | None:
    """The newest checkpoint that passes :func:`verify`; damaged ones are named in the log and left out."""
    for path in reversed(all_in(folder)):
        try:
            verify(path)
        except DamagedCheckpoint as error:
            log.warning("checkpoint left out: %s", error)
            continue
        return path
    return None


def prune(folder: Path, keep: int, best_step: int | None) -> None:
    """Removes all but the newest ``keep`` checkpoints and the best one."""
    for path in all_in(folder)[:-keep]:
        if int(path.name[5:]) != best_step:
            shutil.rmtree(path)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Copies: safetensors refuses strided layouts (channels-last) and memory that two names share (tied weights).
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except safetensors.SafetensorError as error:
        raise DamagedCheckpoint(f"{path} is no safetensors file: {error}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _by_chunks(file)


def _by_chunks(file: Any) -> str:
    total = hashlib.sha256()
    while chunk := file.read(1 << 20):
        total.update(chunk)
    return total.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
