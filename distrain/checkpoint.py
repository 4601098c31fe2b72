"""Checkpoints: complete or absent, checked before use, readable by anybody, and never able to run code.

A checkpoint is a folder ``step_XXXXXXXX`` of safetensors files, keyed by the unsplit model's parameter names, and JSON:

============================  ========================================================================================
``model.safetensors``         parameters and buffers
``optimizer.safetensors``     the optimizer's tensors as ``<parameter>/<what>``
``rank_XXXXX.safetensors``    what one rank alone holds (residuals of its compressor), as ``<part>/<what>/<parameter>``
``state.json``                position in the data, step, best metric, scalars, and the layout of the ranks that saved
``manifest.json``             size and SHA-256 of each of the others; written last
============================  ========================================================================================
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distrain.collectives import Communicator
from distrain.reading import read_json
from distrain.runtime import write_json

log = logging.getLogger(__name__)

_PARTS = ("model", "optimizer")
#: Parts of which every rank has its own.
_OWN_PARTS = ("compressor", "local")
#: Most bytes of a JSON file of a checkpoint.
LARGEST_JSON = 1 << 26
_SAVING = 1
_CPU = torch.device("cpu")


class DamagedCheckpoint(ValueError):
    """A checkpoint is incomplete or differs from its manifest; the message names the file."""


def save(
    folder: Path,
    state: Mapping[str, Any],
    progress: Mapping[str, Any],
    everyone: Communicator | None = None,
    device: torch.device = _CPU,
) -> Path:
    """Writes a checkpoint beside the others and then, in one step, makes it visible; all ranks call it together.

    Args:
        folder: The run's ``checkpoints`` folder.
        state: A strategy's ``state_dict()`` and its ``layout``; of ``model``, ``optimizer`` and ``scalars`` the first
            rank's count, ``compressor`` and ``local`` are each rank's own.
        progress: The trainer's position; ``step`` names the checkpoint.
        everyone: The ranks; by default this one alone.
        device: Where ``everyone`` communicates.

    Returns:
        The checkpoint's folder.
    """
    everyone = everyone if everyone is not None else Communicator()
    final = folder / f"step_{int(progress['step']):08d}"
    temporary = folder / everyone.share({"name": f".{final.name}.{os.getpid()}"}, device)[0]["name"]
    if everyone.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for part in _PARTS:
            save_file(_plain(state[part]), temporary / f"{part}.safetensors")
        held = {"progress": dict(progress), "scalars": state["scalars"], "layout": state["layout"]}
        write_json(temporary / "state.json", held)
    everyone.barrier()
    _save_own(temporary, state, everyone, device)
    if everyone.rank == 0:
        _complete(temporary, final)
    return final


def _save_own(temporary: Path, state: Mapping[str, Any], everyone: Communicator, device: torch.device) -> None:
    """Writes what this rank alone holds; a rank that doesn't see rank 0's folder sends its file there."""
    own = {f"{part}/{name}": tensor for part in _OWN_PARTS for name, tensor in state.get(part, {}).items()}
    file = temporary / _own_file(everyone.rank)
    sees = temporary.is_dir()
    packed = b""
    if own and sees:
        save_file(_plain(own), file)
    elif own:
        packed = safetensors.torch.save(_plain(own))
    for rank, told in enumerate(everyone.share({"sends": len(packed)}, device)):
        if not told["sends"]:
            continue
        if everyone.rank == rank:
            content = torch.frombuffer(bytearray(packed), dtype=torch.uint8).to(device)
            everyone.start_send(content, to=0, tag=_SAVING).wait()
        elif everyone.rank == 0:
            content = torch.empty(told["sends"], dtype=torch.uint8, device=device)
            everyone.start_receive(content, rank, tag=_SAVING).wait()
            (temporary / _own_file(rank)).write_bytes(content.cpu().numpy().data)
    everyone.barrier()


def _own_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def _complete(temporary: Path, final: Path) -> None:
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
    replaced = final.parent / f"{temporary.name}.replaced"
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    _sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


class OwnTensors(Sequence[Mapping[str, Tensor]]):
    """What each rank of the run that saved had for itself, in order of rank; read when asked for.

    Args:
        path: The checkpoint's folder.
        part: ``compressor`` or ``local``.
        ranks: How many ranks saved.
        files: The checkpoint's files; a rank that had nothing has none.
    """

    def __init__(self, path: Path, part: str, ranks: int, files: Container[str]) -> None:
        self._path = path
        self._part = part
        self._ranks = ranks
        self._files = files

    def __len__(self) -> int:
        return self._ranks

    @overload
    def __getitem__(self, rank: int) -> dict[str, Tensor]: ...
    @overload
    def __getitem__(self, rank: slice) -> list[Mapping[str, Tensor]]: ...
    def __getitem__(self, rank: int | slice) -> Mapping[str, Tensor] | list[Mapping[str, Tensor]]:
        if isinstance(rank, slice):
            return [self[each] for each in range(*rank.indices(len(self)))]
        if not 0 <= rank < self._ranks:
            raise IndexError(rank)
        if _own_file(rank) not in self._files:
            return {}
        prefix = f"{self._part}/"
        tensors = _load_tensors(self._path / _own_file(rank))
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def load(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a checkpoint after checking it against its manifest.

    Returns:
        ``(state, progress)`` as :func:`save` was given them, tensors on the CPU; ``compressor`` and ``local`` are
        :class:`OwnTensors`.

    Raises:
        DamagedCheckpoint: A file is missing, cut, or changed.
    """
    files = verify(path)
    state: dict[str, Any] = {}
    try:
        held = read_json(path / "state.json", LARGEST_JSON)
        state["scalars"], progress = dict(held["scalars"]), dict(held["progress"])
        state["layout"] = dict(held["layout"])
        ranks = int(state["layout"]["world_size"])
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedCheckpoint(f"{path / 'state.json'} can't be read") from error
    for part in _PARTS:
        state[part] = _load_tensors(path / f"{part}.safetensors")
    for part in _OWN_PARTS:
        state[part] = OwnTensors(path, part, ranks, files)
    return state, progress


def load_model(path: Path) -> dict[str, Tensor]:
    """The model's tensors alone, checked like :func:`load` does."""
    verify(path)
    return _load_tensors(path / "model.safetensors")


def verify(path: Path) -> set[str]:
    """Compares every file with the manifest.

    Returns:
        The names of the files.

    Raises:
        DamagedCheckpoint: Names the first file that differs.
    """
    manifest_path = path / "manifest.json"
    try:
        manifest = read_json(manifest_path, LARGEST_JSON)
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest.items()}
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{manifest_path} is missing") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DamagedCheckpoint(f"{manifest_path} can't be read") from None
    _refuse_link(manifest_path)
    always = [*(f"{part}.safetensors" for part in _PARTS), "state.json"]
    for name in [*always, *(name for name in expected if name not in always)]:
        file = path / name
        if file.name != name:
            raise DamagedCheckpoint(f"{manifest_path} lists {name!r}, which is no file of a checkpoint")
        if name not in expected:
            raise DamagedCheckpoint(f"{manifest_path} doesn't list {name}")
        if not file.is_file():
            raise DamagedCheckpoint(f"{file} is missing")
        _refuse_link(file)
        size, digest = expected[name]
        if file.stat().st_size != size:
            raise DamagedCheckpoint(f"{file} has {file.stat().st_size} bytes, not {size}")
        if _sha256(file) != digest:
            raise DamagedCheckpoint(f"{file} differs from its checksum")
    return set(expected)


def _refuse_link(file: Path) -> None:
    if not file.resolve().is_relative_to(file.parent.resolve()):
        raise DamagedCheckpoint(f"{file} is a link that leaves the checkpoint")


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
