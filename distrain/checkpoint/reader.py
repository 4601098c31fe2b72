"""Reading a checkpoint: every file is compared with the manifest first, and no file can run code."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from distrain.checkpoint.format import (
    MAX_JSON_BYTES,
    OPTIONAL_PARTS,
    PARTS,
    PER_RANK_PARTS,
    DamagedCheckpoint,
    list_checkpoints,
    part_files,
    per_rank_file,
    step_of,
    unreadable,
)
from distrain.checkpoint.saved_tensors import SavedTensors
from distrain.checkpoint.state_schema import read_state
from distrain.files import untrusted

log = logging.getLogger(__name__)

#: Most files of a checkpoint, a few for each rank; and most tensors of a file, a few for each parameter.
_MAX_FILES, _MAX_TENSORS = 1 << 16, 1 << 17
#: Unit of ``st_blocks``.
_BLOCK_BYTES = 512


class PerRankTensors(Sequence[Mapping[str, Tensor]]):
    """The tensors that each rank of the saving run had for itself, in order of rank; read from disk when indexed.

    Args:
        path: The checkpoint's folder.
        part: ``compressor`` or ``local``.
        ranks: World size of the run that saved.
        files: The checkpoint's files; a rank without such tensors has no file.
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
            return [self[index] for index in range(*rank.indices(len(self)))]
        if not 0 <= rank < self._ranks:
            raise IndexError(rank)
        if per_rank_file(rank) not in self._files:
            return {}
        prefix = f"{self._part}/"
        tensors = _load_tensors(self._path / per_rank_file(rank))
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def load(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a checkpoint after checking it against its manifest.

    Returns:
        ``(state, progress)`` as given to :func:`distrain.checkpoint.writer.save`, with tensors on the CPU, which are
        read when they are used: ``model``, ``optimizer`` and ``average`` are :class:`SavedTensors`, whole also where
        ranks have saved slices; ``compressor`` and ``local`` are :class:`PerRankTensors`.

    Raises:
        DamagedCheckpoint: A file is missing, cut short, or changed.
    """
    files = _compare_with_manifest(path)
    content = read_state(path)
    # Old checkpoints were saved without configuration and data.
    state = {key: content.get(key) for key in ("scalars", "layout", "config", "data")}
    for part in PARTS:
        state[part] = _part(path, part, files)
    for part in PER_RANK_PARTS:
        state[part] = PerRankTensors(path, part, content["layout"]["world_size"], files)
    return state, content["progress"]


def load_model(path: Path, average: str | None = None) -> SavedTensors:
    """The model's tensors only, each of them read when it is used; checks the whole checkpoint against its manifest.

    Args:
        path: The checkpoint's folder.
        average: Take the values of this average, ``ema`` or ``swa``, where it has some.

    Raises:
        DamagedCheckpoint: A file is missing, cut short, or changed.
    """
    files = verify(path)
    model = _part(path, "model", files)
    if average is None:
        return model
    averaged = _part(path, "average", files).entries
    return SavedTensors({name: averaged.get(f"{average}/{name}", entry) for name, entry in model.entries.items()})


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file that may come from anywhere.

    Raises:
        DamagedCheckpoint: It is not a regular safetensors file, or is of a size that no model has.
        OSError: It can't be opened.
    """
    try:
        _check_size(path)
    except untrusted.UnreadableFile as error:
        raise DamagedCheckpoint(f"{path}: {error}") from error
    return _load_tensors(path)


def shapes_of(path: Path, part: str) -> dict[str, torch.Size]:
    """Names and shapes of a part's tensors, from the files' headers; nothing is compared with the manifest.

    Args:
        path: The checkpoint's folder.
        part: ``model``, ``optimizer`` or ``average``.

    Raises:
        DamagedCheckpoint: A file can't be read, or is not a safetensors file.
    """
    try:
        names = part_files(part, [each.name for each in path.iterdir()])
        for name in names:
            _check_link(path / name)
            _check_size(path / name)
    except OSError as error:
        raise unreadable(path, error) from error
    except untrusted.UnreadableFile as error:
        raise DamagedCheckpoint(f"{path}: {error}") from error
    return {name: entry.shape for name, entry in _part(path, part, names).entries.items()}


def verify(path: Path) -> set[str]:
    """Compares every file with the manifest, and the content of ``state.json`` with what it may hold.

    Returns:
        The names of the files.

    Raises:
        DamagedCheckpoint: Names the first file that differs or can't be read, or the field with a wrong value.
    """
    files = _compare_with_manifest(path)
    read_state(path)
    return files


def _compare_with_manifest(path: Path) -> set[str]:
    try:
        return _compare_files(path)
    except OSError as error:
        raise unreadable(path, error) from error
    except untrusted.UnreadableFile as error:
        raise DamagedCheckpoint(f"{path}: {error}") from error


def _compare_files(path: Path) -> set[str]:
    manifest_path = path / "manifest.json"
    try:
        manifest = untrusted.read_json(manifest_path, MAX_JSON_BYTES)
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest.items()}
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{manifest_path} is missing") from None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise DamagedCheckpoint(f"{manifest_path} can't be read ({error})") from error.__cause__
    _check_link(manifest_path)
    if len(expected) > _MAX_FILES:
        problem = f"lists {len(expected)} files, and no run writes more than {_MAX_FILES}"
        raise DamagedCheckpoint(f"{manifest_path} {problem}")
    required = [
        *(name for part in PARTS for name in part_files(part, expected) or _required_file(part)),
        "state.json",
    ]
    for name in [*required, *(name for name in expected if name not in required)]:
        file = path / name
        if file.name != name:
            raise DamagedCheckpoint(f"{manifest_path} lists {name!r}, which is not the name of a checkpoint's file")
        if name not in expected:
            raise DamagedCheckpoint(f"{manifest_path} doesn't list {name}")
        if not file.is_file():
            raise DamagedCheckpoint(f"{file} is missing")
        _check_link(file)
        size, digest = expected[name]
        if file.stat().st_size != size:
            raise DamagedCheckpoint(f"{file} has {file.stat().st_size} bytes, not {size}")
        _check_size(file)
        if _sha256(file) != digest:
            raise DamagedCheckpoint(f"{file} differs from its checksum")
    return set(expected)


def _required_file(part: str) -> list[str]:
    return [] if part in OPTIONAL_PARTS else [f"{part}.safetensors"]


def is_valid(path: Path) -> bool:
    """Whether a checkpoint passes :func:`verify`.

    Raises:
        OSError: The disk fails, so that nothing is known of it.
    """
    try:
        verify(path)
    except DamagedCheckpoint as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from error
        return False
    return True


def newest_valid(folder: Path, before: Path | None = None) -> Path | None:
    """The newest checkpoint that passes :func:`verify`; newer damaged ones are skipped and named in the log.

    Args:
        folder: The run's ``checkpoints`` folder.
        before: Only checkpoints of earlier steps than this one's are looked at.
    """
    for path in reversed(list_checkpoints(folder)):
        if before is not None and step_of(path) >= step_of(before):
            continue
        try:
            verify(path)
        except DamagedCheckpoint as error:
            log.warning("checkpoint left out: %s", error)
            continue
        return path
    return None


def _part(path: Path, part: str, files: Iterable[str]) -> SavedTensors:
    """The tensors of a part of the unsplit state, in one file or in the files of several ranks."""
    return SavedTensors.of_files([path / name for name in part_files(part, files)])


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except OSError as error:
        raise unreadable(path, error) from error
    except safetensors.SafetensorError as error:
        raise DamagedCheckpoint(f"{path} is not a safetensors file: {error}") from error


def _check_link(file: Path) -> None:
    if not file.resolve().is_relative_to(file.parent.resolve()):
        raise DamagedCheckpoint(f"{file} is a link that leaves the checkpoint")


def _check_size(file: Path) -> None:
    """Refuses what would take hours to hash or to load, though it takes next to no room on the disk."""
    found = file.stat()
    # Windows tells neither the memory nor the blocks in this way.
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else found.st_size
    if found.st_size > memory and found.st_blocks * _BLOCK_BYTES < found.st_size // 2:
        raise DamagedCheckpoint(f"{file} has {found.st_size} bytes, more than this host's memory, and most are a hole")
    if file.suffix != ".safetensors":
        if found.st_size > MAX_JSON_BYTES:
            raise DamagedCheckpoint(f"{file} has {found.st_size} bytes, and no run writes more than {MAX_JSON_BYTES}")
        return
    with untrusted.open_regular(file) as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = opened.read(min(length, MAX_JSON_BYTES))
    if length > MAX_JSON_BYTES or header.count(b'"data_offsets"') > _MAX_TENSORS:
        raise DamagedCheckpoint(f"{file} says that it holds more tensors than any run writes ({_MAX_TENSORS})")


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with untrusted.open_regular(path) as file:
        while chunk := file.read(1 << 20):
            total.update(chunk)
    return total.hexdigest()
