"""Checkpoints: complete or absent, checked before use, readable by anybody, and never able to run code.

A checkpoint is a folder ``step_XXXXXXXX`` of safetensors files, keyed by the unsplit model's parameter names, and JSON:

============================  ========================================================================================
``model.safetensors``         parameters and buffers
``optimizer.safetensors``     the optimizer's tensors as ``<parameter>/<what>``
``rank_XXXXX.safetensors``    what one rank alone holds (residuals of its compressor), as ``<part>/<what>/<parameter>``
``state.json``                position in the data, step, best metric, scalars, and the layout of the ranks that saved
``manifest.json``             size and SHA-256 of each of the others; written last
============================  ========================================================================================

Where several ranks hold parts of the model, each writes its own: ``model_XXXXX.safetensors`` and
``optimizer_XXXXX.safetensors`` by the rank's number, each tensor in one of them. Nothing is gathered.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import safetensors.torch
import torch
from safetensors.torch import load_file
from torch import Tensor

from distrain.checkpoint import safetensors_writer
from distrain.checkpoint.safetensors_writer import Content
from distrain.communication.collectives import Communicator
from distrain.files.untrusted import read_json
from distrain.files.writing import as_json

log = logging.getLogger(__name__)

#: Parts of which each tensor is held by one rank that is responsible for it.
PARTS = ("model", "optimizer")
#: Parts of which every rank has its own.
OWN_PARTS = ("compressor", "local")
#: Most bytes of a JSON file of a checkpoint.
LARGEST_JSON = 1 << 26
_SAVING = 1
_CPU = torch.device("cpu")
#: A hidden folder is being written, moved away or removed: the checkpoint, the host and process of rank 0, and which.
_HIDDEN = re.compile(r"\.(step_\d+)\.(?:(.+)\.)?(\d+)(\.replaced|\.removed)?")
#: A hidden folder in which no file was made for so long is nobody's, wherever its process was.
_ABANDONED_SECONDS = 3600


class DamagedCheckpoint(ValueError):
    """A checkpoint is incomplete or differs from its manifest; the message names the file."""


class NotSaved(OSError):
    """A rank could not write its part of a checkpoint; raised on all ranks, and names rank, host, path and error."""


def folder_of(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir / "checkpoints"


def path_of(folder: Path, step: int) -> Path:
    """The checkpoint of a step in such a folder."""
    return folder / f"step_{step:08d}"


# --- saving ----------------------------------------------------------------------------------------------------------


def save(
    folder: Path,
    state: Mapping[str, Any],
    progress: Mapping[str, Any],
    everyone: Communicator | None = None,
    device: torch.device = _CPU,
) -> Path:
    """Writes a checkpoint beside the others and then, in one step, makes it visible; all ranks call it together.

    Each rank writes, syncs and hashes its own files; one that doesn't see rank 0's folder sends them there.

    Args:
        folder: The run's ``checkpoints`` folder.
        state: A strategy's ``state_dict()``, its ``layout`` and the run's ``config`` as plain data; of ``model`` and
            ``optimizer`` this rank's tensors, of ``scalars`` the first rank's count, ``compressor`` and ``local`` are
            each rank's own.
        progress: The trainer's position; ``step`` names the checkpoint.
        everyone: The ranks; by default this one alone.
        device: Where ``everyone`` communicates.

    Returns:
        The checkpoint's folder.

    Raises:
        NotSaved: A rank could not write. What was there before is as it was, and nothing is left of the new one.
    """
    everyone = everyone if everyone is not None else Communicator()
    final = path_of(folder, int(progress["step"]))
    temporary = _hidden(final)
    try:
        _save(temporary, final, state, progress, _Exchange(everyone, device))
    except NotSaved:
        if everyone.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _save(
    temporary: Path, final: Path, state: Mapping[str, Any], progress: Mapping[str, Any], exchange: _Exchange
) -> None:
    rank = exchange.everyone.rank
    with exchange.noting_problems():
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    told = exchange.share({"folder": temporary.name, "parts": [part for part in PARTS if state[part]]})
    # Rank 0's, since names differ by process.
    temporary = final.parent / told[0]["folder"]
    holders = {part: [each for each, mine in enumerate(told) if part in mine["parts"]] for part in PARTS}
    files = _write_own(temporary, _files_of(rank, state, holders), exchange)
    with exchange.noting_problems():
        if rank == 0 and not exchange.problem:
            held = {"progress": dict(progress), "scalars": state["scalars"], "layout": state["layout"]}
            held["config"] = state.get("config")
            _complete(temporary, final, held, files)
    # Nobody goes on before it is known whether the checkpoint is there.
    exchange.share({})


class _Exchange:
    """What ranks tell each other while they save; what one could not write becomes known to all.

    Args:
        everyone: The ranks.
        device: Where they communicate.

    Attributes:
        problem: What this rank could not do.
    """

    def __init__(self, everyone: Communicator, device: torch.device) -> None:
        self.everyone = everyone
        self.device = device
        self.problem: str | None = None

    @contextmanager
    def noting_problems(self) -> Iterator[None]:
        """What goes wrong with files in here is told to all in the next :meth:`share`, for which they wait."""
        try:
            yield
        except OSError as error:
            code = errno.errorcode.get(error.errno or 0, "no errno")
            where = f"{error.filename}: " if error.filename else ""
            self.problem = f"{where}{error.strerror or error} ({code})"

    def share(self, mine: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Every rank's plain data.

        Raises:
            NotSaved: A rank had a problem.
        """
        told = self.everyone.share({**mine, "host": socket.gethostname(), "problem": self.problem}, self.device)
        problems = [
            f"rank {rank} on {each['host']}: {each['problem']}" for rank, each in enumerate(told) if each["problem"]
        ]
        if problems:
            raise NotSaved("; ".join(problems))
        return told


def _files_of(
    rank: int, state: Mapping[str, Any], holders: Mapping[str, Sequence[int]]
) -> dict[str, dict[str, Tensor]]:
    """The files that a rank writes, by name."""
    files = {}
    for part in PARTS:
        writers = holders[part] or [0]
        if rank in writers:
            name = f"{part}.safetensors" if len(writers) == 1 else f"{part}_{rank:05d}.safetensors"
            files[name] = dict(state[part])
    own = {f"{part}/{name}": tensor for part in OWN_PARTS for name, tensor in state.get(part, {}).items()}
    if own:
        files[_own_file(rank)] = own
    return files


def _own_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def _write_own(temporary: Path, files: Mapping[str, Mapping[str, Tensor]], exchange: _Exchange) -> dict[str, Content]:
    """Writes this rank's files, or has rank 0 do it; returns what all ranks wrote."""
    everyone, device = exchange.everyone, exchange.device
    written: dict[str, Content] = {}
    packed: dict[str, bytes] = {}
    sees = temporary.is_dir()
    with exchange.noting_problems():
        for name, tensors in files.items():
            if sees:
                written[name] = safetensors_writer.write(temporary / name, safetensors_writer.chunks(tensors))
            else:
                packed[name] = b"".join(safetensors_writer.chunks(tensors))
                written[name] = safetensors_writer.content_of(packed[name])
    told = exchange.share({"written": written, "sends": list(packed)})
    for rank, each in enumerate(told):
        for name in each["sends"]:
            if everyone.rank == rank:
                content = torch.frombuffer(bytearray(packed[name]), dtype=torch.uint8).to(device)
                everyone.start_send(content, to=0, tag=_SAVING).wait()
            elif everyone.rank == 0:
                content = torch.empty(each["written"][name]["bytes"], dtype=torch.uint8, device=device)
                everyone.start_receive(content, rank, tag=_SAVING).wait()
                # Even if it can't be written: those who send wait for it to be taken.
                with exchange.noting_problems():
                    safetensors_writer.write(temporary / name, [content.cpu().numpy().data])
    return {name: content for each in told for name, content in each["written"].items()}


def _complete(temporary: Path, final: Path, held: Mapping[str, Any], files: Mapping[str, Content]) -> None:
    """Writes what is written once, and gives the folder its name."""
    everything = {**files, "state.json": safetensors_writer.write(temporary / "state.json", [as_json(held).encode()])}
    # Without a newline in the end: cut by a single byte it can't be read.
    manifest = json.dumps(dict(sorted(everything.items())), indent=2).encode()
    safetensors_writer.write(temporary / "manifest.json", [manifest])
    _sync(temporary)
    # The same step saved again (a resumed run): the old one moves away whole, since a rename needs the name free and
    # a folder that is being deleted must not be taken for a checkpoint.
    replaced = final.parent / f"{temporary.name}.replaced"
    if final.exists():
        final.rename(replaced)
    try:
        temporary.rename(final)
    except OSError:
        if replaced.exists():
            replaced.rename(final)
        raise
    _sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _hidden(final: Path) -> Path:
    return final.with_name(f".{final.name}.{socket.gethostname()}.{os.getpid()}")


# --- reading ---------------------------------------------------------------------------------------------------------


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
        # Checkpoints of before it was saved have none.
        state["config"] = dict(held["config"]) if held.get("config") is not None else None
        ranks = int(state["layout"]["world_size"])
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedCheckpoint(f"{path / 'state.json'} can't be read") from error
    for part in PARTS:
        state[part] = _load_part(path, part, files)
    for part in OWN_PARTS:
        state[part] = OwnTensors(path, part, ranks, files)
    return state, progress


def load_model(path: Path) -> dict[str, Tensor]:
    """The model's tensors alone, checked like :func:`load` does."""
    return _load_part(path, "model", verify(path))


def _load_part(path: Path, part: str, files: Iterable[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in _files_with(part, files):
        tensors = _load_tensors(path / name)
        for twice in found.keys() & tensors.keys():
            raise DamagedCheckpoint(f"{path / name} holds {twice}, which another file holds too")
        found |= tensors
    return found


def _files_with(part: str, files: Iterable[str]) -> list[str]:
    """The files among them that hold a part: one, or one of each rank that held some of it."""
    return sorted(name for name in files if re.fullmatch(rf"{part}(_\d{{5,}})?\.safetensors", name))


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
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        raise DamagedCheckpoint(f"{manifest_path} can't be read") from None
    _refuse_link(manifest_path)
    always = [
        *(name for part in PARTS for name in _files_with(part, expected) or [f"{part}.safetensors"]),
        "state.json",
    ]
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


def prune(folder: Path, keep: int, best_step: int | None, newest_step: int) -> None:
    """Removes all but the newest ``keep`` checkpoints and the best one; what can't be removed is named in the log.

    Args:
        folder: The run's ``checkpoints`` folder.
        keep: How many of the newest stay.
        best_step: Step of the best.
        newest_step: Step of the one that was just saved. Later ones are of a course that the run has left for an
            earlier checkpoint or a new beginning; they are removed, or a later start would go on from them.
    """
    steps = {int(path.name[5:]): path for path in all_in(folder)}
    left = [path for step, path in steps.items() if step > newest_step]
    if left:
        log.warning("removes what was saved on a course that this run has left: %s", ", ".join(map(str, left)))
    ours = sorted(step for step in steps if step <= newest_step)
    for path in [*left, *(steps[step] for step in ours[:-keep] if step != best_step)]:
        removed = path.with_name(f"{_hidden(path).name}.removed")
        try:
            # A folder that is being deleted must not be taken for a checkpoint.
            path.rename(removed)
            shutil.rmtree(removed)
        except OSError as error:
            log.warning("can't remove an old checkpoint: %s", error)


def tidy(folder: Path) -> None:
    """Clears away what processes that died while they saved have left; nobody may be saving in this process.

    Such a process may have left a checkpoint complete but without its name, which it is given.
    """
    for path in sorted(folder.glob(".step_*")):
        parsed = _HIDDEN.fullmatch(path.name)
        if parsed is None:
            continue
        try:
            if _is_used(path, parsed[2], int(parsed[3])):
                continue
            if (final := give_name(path)) is not None:
                log.warning("%s was complete but for its name when its process died", final)
            else:
                shutil.rmtree(path)
                log.info("removed %s, left by a process that died", path)
        except OSError as error:
            log.warning("can't remove what a process that died has left: %s", error)


def give_name(hidden: Path) -> Path | None:
    """Makes a checkpoint of a hidden folder that lacks but the name; returns it, or ``None`` where that is not so."""
    parsed = _HIDDEN.fullmatch(hidden.name)
    if parsed is None or parsed[4] == ".removed":
        return None
    final = hidden.with_name(parsed[1])
    if final.exists() or not _is_sound(hidden):
        return None
    return hidden.rename(final)


def _is_used(path: Path, host: str | None, process: int) -> bool:
    if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
        return False
    if host != socket.gethostname():
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()


def _is_sound(path: Path) -> bool:
    try:
        verify(path)
    except DamagedCheckpoint:
        return False
    return True


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
