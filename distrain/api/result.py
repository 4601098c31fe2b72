"""The result of a training, which every rank reads: from the run's folder, or a copy where only rank 0 sees that."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from distrain.checkpoint import reader as checkpoint_reader
from distrain.checkpoint.format import checkpoints_folder
from distrain.runtime.run_owner import claim_path
from distrain.runtime.runtime import Runtime

#: What is read of a run's folder, besides its newest checkpoint.
_FILES = ("config.yaml", "data.json", "metrics.jsonl", "summary.json")
#: How much is sent at once.
_CHUNK_BYTES = 1 << 24


@dataclass
class Result:
    """Where the result of a training lies.

    Attributes:
        run_dir: The run's folder, or this rank's copy of it.
        copy: Removes the copy when nothing refers to it any more; ``None`` if there is none.
    """

    run_dir: Path
    copy: tempfile.TemporaryDirectory[str] | None = None


def shared_result(runtime: Runtime) -> Result:
    """The run's folder, or a copy on a rank whose host doesn't see it; all ranks call it together, inside the runtime.

    A copy holds the configuration, the metrics, the summary and the newest checkpoint.

    Raises:
        OSError: A file can't be read, or the copy can't be written.
    """
    communicator, device, run_dir = runtime.communicator(), runtime.device, runtime.run_dir
    # A folder of the same name on another host may hold another run, so the claim of this start is compared.
    claims = [found["claim"] for found in communicator.all_gather_json({"claim": _claim(run_dir)}, device)]
    if all(claim == claims[0] != "" for claim in claims) or len(claims) == 1:
        return Result(run_dir)
    sizes = {str(path): run_dir.joinpath(path).stat().st_size for path in _parts(run_dir)} if runtime.is_main else {}
    sizes = communicator.all_gather_json(sizes, device)[0]
    copy = None
    if not runtime.is_main and claims[runtime.world.rank] != claims[0]:
        copy = tempfile.TemporaryDirectory(prefix="distrain_run_")
    for name, size in sizes.items():
        source = run_dir / name if runtime.is_main else None
        target = Path(copy.name) / name if copy is not None else None
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
        for chunk in _sent(runtime, source, size):
            if target is not None:
                with target.open("ab") as file:
                    file.write(chunk)
    return Result(run_dir) if copy is None else Result(Path(copy.name), copy)


def _claim(run_dir: Path) -> str:
    try:
        return claim_path(run_dir).read_text()
    except OSError:
        return ""


def _parts(run_dir: Path) -> list[Path]:
    """Paths of the files that are sent, relative to the run's folder."""
    paths = [run_dir / name for name in _FILES if (run_dir / name).exists()]
    newest = checkpoint_reader.newest_valid(checkpoints_folder(run_dir))
    paths += sorted(newest.iterdir()) if newest is not None else []
    return [path.relative_to(run_dir) for path in paths]


def _sent(runtime: Runtime, source: Path | None, size: int) -> Iterator[bytes]:
    """The content of rank 0's file on every rank, in pieces; only rank 0 has a ``source``."""
    communicator = runtime.communicator()
    with contextlib.nullcontext() if source is None else source.open("rb") as file:
        for start in range(0, size, _CHUNK_BYTES):
            content = bytearray(min(_CHUNK_BYTES, size - start))
            if file is not None:
                # The file has not changed since its size was taken, as the training has ended.
                content[:] = file.read(len(content))
            piece = torch.frombuffer(content, dtype=torch.uint8).to(runtime.device)
            yield communicator.broadcast(piece).cpu().numpy().tobytes()
