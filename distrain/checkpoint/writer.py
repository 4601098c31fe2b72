"""Saving a checkpoint: every rank writes its own files, then rank 0 makes the complete folder visible."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distrain.checkpoint import safetensors_writer
from distrain.checkpoint.format import (
    OPTIONAL_PARTS,
    PARTS,
    PER_RANK_PARTS,
    checkpoint_path,
    per_rank_file,
    temporary_path,
)
from distrain.checkpoint.safetensors_writer import FileDigest
from distrain.checkpoint.saved_tensors import SLICES, Slices, TensorSlice, slices_text
from distrain.communication.collectives import Communicator
from distrain.files.contained_folder import ContainedFolder
from distrain.files.writing import to_json

log = logging.getLogger(__name__)

#: Tag of the messages that carry the files of ranks that don't see rank 0's folder.
_FILE_TAG = 1
_CPU = torch.device("cpu")


class SaveFailed(OSError):
    """A rank could not write its part of a checkpoint; raised on all ranks, and names rank, host, path and error."""


def save(
    folder: Path,
    state: Mapping[str, Any],
    progress: Mapping[str, Any],
    communicator: Communicator | None = None,
    device: torch.device = _CPU,
    *,
    may_write: Callable[[], bool] = lambda: True,
) -> Path:
    """Writes a checkpoint into a hidden folder and renames it when it is complete. A collective call.

    Each rank writes, syncs and hashes its own files. A rank that doesn't see rank 0's folder sends its files there.

    Args:
        folder: The run's ``checkpoints`` folder.
        state: A strategy's ``state_dict()``, its ``layout``, and as plain data the run's ``config`` and what is
            known of its ``data``. ``model``, ``optimizer`` and ``average``, which may be missing, hold this rank's
            tensors, ``compressor`` and ``local`` the state of this rank only; of ``scalars`` and ``layout`` those of
            rank 0 are saved. ``slices``, which may be missing, says for each part which of this rank's tensors are
            slices: see :class:`distrain.checkpoint.saved_tensors.TensorSlice`.
        progress: The trainer's position; ``step`` names the checkpoint.
        communicator: The ranks that save together; by default this rank alone.
        device: Device of the tensors that ``communicator`` exchanges.
        may_write: Returns whether this start still owns the run's folder; if not, no checkpoint is made.

    Returns:
        The checkpoint's folder.

    Raises:
        SaveFailed: A rank could not write. Existing checkpoints are unchanged, and the temporary folder is removed.
    """
    communicator = communicator if communicator is not None else Communicator()
    final = checkpoint_path(folder, int(progress["step"]))
    temporary = temporary_path(final)
    try:
        _save(temporary, final, state, progress, _ErrorExchange(communicator, device), may_write)
    except SaveFailed:
        if communicator.rank == 0:
            _remove_quietly(*_contained(temporary))
        raise
    return final


def _save(
    temporary: Path,
    final: Path,
    state: Mapping[str, Any],
    progress: Mapping[str, Any],
    exchange: _ErrorExchange,
    may_write: Callable[[], bool],
) -> None:
    rank = exchange.communicator.rank
    with exchange.catching_errors():
        if rank == 0:
            contained, name = _contained(temporary)
            _remove_quietly(contained, name)
            contained.make_folder(name)
    ranks = exchange.all_gather({"folder": temporary.name, "parts": [part for part in PARTS if state.get(part)]})
    # The name holds the process id, so all ranks use the one of rank 0.
    temporary = final.parent / ranks[0]["folder"]
    holders = {part: [index for index, other in enumerate(ranks) if part in other["parts"]] for part in PARTS}
    digests = _write_rank_files(temporary, _files_of_rank(rank, state, holders), exchange)
    with exchange.catching_errors():
        if rank == 0 and not exchange.error:
            content = {"progress": dict(progress), "scalars": state["scalars"], "layout": state["layout"]}
            content |= {"config": state.get("config"), "data": state.get("data")}
            _complete(temporary, content, digests)
            if not may_write():
                problem = "the run folder was removed, or another start of this run has taken it"
                raise OSError(errno.EPERM, problem, str(final))
            _publish(temporary, final)
    # No rank continues before all know whether the checkpoint exists.
    exchange.all_gather({})


class _ErrorExchange:
    """Exchanges plain data among the ranks that save; an error of one rank is raised on all.

    Args:
        communicator: The ranks.
        device: Device of the tensors that they exchange.

    Attributes:
        error: This rank's file error as text, once there was one.
    """

    def __init__(self, communicator: Communicator, device: torch.device) -> None:
        self.communicator = communicator
        self.device = device
        self.error: str | None = None

    @contextlib.contextmanager
    def catching_errors(self) -> Iterator[None]:
        """Keeps an ``OSError`` of the block for the next :meth:`all_gather`, where the other ranks wait for it."""
        try:
            yield
        except OSError as error:
            code = errno.errorcode.get(error.errno or 0, "no errno")
            path = f"{error.filename}: " if error.filename else ""
            self.error = f"{path}{error.strerror or error} ({code})"

    def all_gather(self, data: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Every rank's plain data, in order of rank.

        Raises:
            SaveFailed: A rank had an error.
        """
        ranks = self.communicator.all_gather_json(
            {**data, "host": socket.gethostname(), "error": self.error}, self.device
        )
        errors = [
            f"rank {rank} on {other['host']}: {other['error']}" for rank, other in enumerate(ranks) if other["error"]
        ]
        if errors:
            raise SaveFailed("; ".join(errors))
        return ranks


def _files_of_rank(
    rank: int, state: Mapping[str, Any], holders: Mapping[str, Sequence[int]]
) -> dict[str, tuple[dict[str, Tensor], Mapping[str, TensorSlice]]]:
    """The files that a rank writes: their tensors by file name, and which of these are slices.

    Args:
        rank: This rank.
        state: As given to :func:`save`.
        holders: The ranks that hold tensors of each part.
    """
    files: dict[str, tuple[dict[str, Tensor], Mapping[str, TensorSlice]]] = {}
    slices: Slices = state.get("slices", {})
    for part in PARTS:
        writers = holders[part] or ([] if part in OPTIONAL_PARTS else [0])
        if rank in writers:
            name = f"{part}.safetensors" if len(writers) == 1 else f"{part}_{rank:05d}.safetensors"
            files[name] = dict(state[part]), slices.get(part, {})
    own = {f"{part}/{name}": tensor for part in PER_RANK_PARTS for name, tensor in state.get(part, {}).items()}
    if own:
        files[per_rank_file(rank)] = own, {}
    return files


def _write_rank_files(
    temporary: Path,
    files: Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, TensorSlice]]],
    exchange: _ErrorExchange,
) -> dict[str, FileDigest]:
    """Writes this rank's files, or sends them to rank 0 to be written; returns the digests of all ranks' files."""
    communicator, device = exchange.communicator, exchange.device
    digests: dict[str, FileDigest] = {}
    serialized: dict[str, bytes] = {}
    contained, folder = _contained(temporary)
    with exchange.catching_errors():
        # Rank 0 made it; if it has been removed since, that is an error.
        sees_folder = communicator.rank == 0 or contained.is_folder(folder)
        for name, (tensors, slices) in files.items():
            content = safetensors_writer.serialize(tensors, {SLICES: slices_text(slices)} if slices else {})
            if sees_folder:
                digests[name] = safetensors_writer.write(contained, f"{folder}/{name}", content)
            else:
                serialized[name] = b"".join(content)
                digests[name] = safetensors_writer.digest_of(serialized[name])
    ranks = exchange.all_gather({"digests": digests, "sends": list(serialized)})
    for rank, other in enumerate(ranks):
        for name in other["sends"]:
            if communicator.rank == rank:
                sent = torch.frombuffer(bytearray(serialized[name]), dtype=torch.uint8).to(device)
                communicator.start_send(sent, to=0, tag=_FILE_TAG).wait()
            elif communicator.rank == 0:
                received = torch.empty(other["digests"][name]["bytes"], dtype=torch.uint8, device=device)
                communicator.start_receive(received, rank, tag=_FILE_TAG).wait()
                # After an error the rest is received all the same, since its senders wait for that.
                with exchange.catching_errors():
                    safetensors_writer.write(contained, f"{folder}/{name}", [received.cpu().numpy().data])
    return {name: digest for other in ranks for name, digest in other["digests"].items()}


def _complete(temporary: Path, content: Mapping[str, Any], digests: Mapping[str, FileDigest]) -> None:
    """Writes ``state.json`` and the manifest."""
    contained, folder = _contained(temporary)
    state_digest = safetensors_writer.write(contained, f"{folder}/state.json", [to_json(content).encode()])
    # Without a newline at the end, so that a manifest that lost its last byte is no longer JSON.
    manifest = json.dumps(dict(sorted({**digests, "state.json": state_digest}.items())), indent=2).encode()
    safetensors_writer.write(contained, f"{folder}/manifest.json", [manifest])
    contained.sync(folder)


def _publish(temporary: Path, final: Path) -> None:
    """Gives the complete folder its final name."""
    contained, folder = _contained(temporary)
    final_name = _contained(final)[1]
    # A resumed run may save the same step again. Renaming needs the name to be free, and a folder that is being deleted
    # must not look like a checkpoint, so the old one is renamed first and deleted last.
    replaced = f"{folder}.replaced"
    if contained.exists(final_name):
        contained.rename(final_name, replaced)
    try:
        contained.rename(folder, final_name)
    except OSError:
        if contained.exists(replaced):
            contained.rename(replaced, final_name)
        raise
    try:
        contained.sync(final.parent.name)
    except OSError as error:
        # The checkpoint is there and complete, so this must not count as a failed save.
        log.warning("%s would not survive a crash of the machine: %s", final, error.strerror)
    _remove_quietly(contained, replaced)


def _contained(path: Path) -> tuple[ContainedFolder, str]:
    """The run's folder and the path in it, for the folder of a checkpoint."""
    return ContainedFolder(path.parent.parent), f"{path.parent.name}/{path.name}"


def _remove_quietly(folder: ContainedFolder, name: str) -> None:
    # A later start removes what stays; see `retention.remove_leftovers`.
    with contextlib.suppress(OSError):
        folder.remove_tree(name)
