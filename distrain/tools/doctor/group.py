"""Forms the job's process groups under a time limit of their own, and times all-reduce by size."""

from __future__ import annotations

import datetime
import threading
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from distrain.communication.collectives import Communicator
from distrain.compression.autotune.link_model import measure_link
from distrain.runtime import runtime
from distrain.runtime.world import World

#: Bytes of the largest message, unless a smaller one took long enough to tell.
_MOST = 16 << 20


@dataclass(frozen=True)
class Reduction:
    """All-reduce over all ranks by one backend.

    Attributes:
        backend: Which.
        error: Why it did not work; empty where it did.
        points: Bytes that each rank sends and seconds on the slowest rank, by growing size.
    """

    backend: str
    error: str = ""
    points: list[tuple[int, float]] = field(default_factory=list)


def time_all_reduce(backend: str, world: World, store: Store, patience: float) -> Reduction:
    """Measures on all ranks together.

    A group that can't form may hang for minutes whatever limit it was given, so it is left behind in its thread.

    Args:
        backend: gloo, or nccl, for which each rank has a GPU.
        world: This rank's place; all ranks of the world must take part.
        store: Where they meet.
        patience: Seconds until it counts as failed.
    """
    found: list[Reduction] = []

    def work() -> None:
        try:
            found.append(_measure(backend, world, store, patience))
        except Exception as error:  # whatever torch raises is the finding
            found.append(Reduction(backend, str(error).strip().splitlines()[0]))

    runtime.joined_group = True
    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(patience)
    return found[0] if found else Reduction(backend, f"no answer within {patience:g} s")


def _measure(backend: str, world: World, store: Store, patience: float) -> Reduction:
    device = torch.device("cuda", world.local_rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        store=PrefixStore(backend, store),
        rank=world.rank,
        world_size=world.size,
        timeout=datetime.timedelta(seconds=patience),
    )
    try:
        link = measure_link(Communicator(dist.group.WORLD), device, _MOST)
        return Reduction(backend, "", [(point.sent, point.seconds) for point in link.points("all_reduce")])
    finally:
        dist.destroy_process_group()
