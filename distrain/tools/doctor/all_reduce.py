"""Forms the job's process groups under a time limit and times all-reduce by message size."""

from __future__ import annotations

import datetime
import threading
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from distrain.communication.collectives import Communicator
from distrain.compression.autotune.link_model import measure_link
from distrain.errors import first_line
from distrain.runtime import runtime
from distrain.runtime.world import World

#: Size of the largest message in bytes. Measuring stops earlier when a smaller message takes long enough to time.
_MAX_BYTES = 16 << 20


@dataclass(frozen=True)
class AllReduceTiming:
    """Times of an all-reduce over all ranks with one backend.

    Attributes:
        backend: ``gloo`` or ``nccl``.
        error: Why the all-reduce failed; empty if it worked.
        points: Pairs of bytes that each rank sends and seconds on the slowest rank, by growing size.
        medium: What carried the messages; ranks of one host use no network.
    """

    backend: str
    error: str = ""
    points: list[tuple[int, float]] = field(default_factory=list)
    medium: str = ""


def time_all_reduce(backend: str, world: World, store: Store, timeout: float) -> AllReduceTiming:
    """Times all-reduce; all ranks of the world must call this together.

    Runs in a thread that is abandoned after the timeout, because a group that cannot form may hang for minutes
    whatever timeout torch was given.

    Args:
        backend: ``gloo``, or ``nccl``, which needs one GPU per rank.
        world: This rank's place among all ranks.
        store: The store through which the process group forms.
        timeout: Seconds until the measurement counts as failed.
    """
    result: list[AllReduceTiming] = []

    def work() -> None:
        try:
            result.append(_measure(backend, world, store, timeout))
        except Exception as error:  # whatever torch raises is part of the report
            result.append(AllReduceTiming(backend, first_line(error)))

    runtime.joined_group = True
    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(timeout)
    return result[0] if result else AllReduceTiming(backend, f"no answer within {timeout:g} s")


def _measure(backend: str, world: World, store: Store, timeout: float) -> AllReduceTiming:
    device = torch.device("cuda", world.local_rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        store=PrefixStore(backend, store),
        rank=world.rank,
        world_size=world.size,
        timeout=datetime.timedelta(seconds=timeout),
    )
    try:
        communicator = Communicator(dist.group.WORLD)
        link = measure_link(communicator, device, _MAX_BYTES)
        points = [(sample.sent, sample.seconds) for sample in link.samples("all_reduce")]
        return AllReduceTiming(backend, "", points, communicator.medium(torch.empty(1, device=device)))
    finally:
        dist.destroy_process_group()
