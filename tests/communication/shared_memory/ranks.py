"""Groups of ranks that share memory, for tests."""

from __future__ import annotations

import datetime
import os

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from distrain.communication.collectives import Communicator


def form_group(limit: float = 30) -> Communicator:
    """A communicator of all ranks, over a group with a timeout in seconds."""
    torch.set_num_threads(1)
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    dist.init_process_group(
        "gloo",
        store=PrefixStore("test", store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=datetime.timedelta(seconds=limit),
    )
    return Communicator(dist.group.WORLD)


def shares_memory(everyone: Communicator) -> bool:
    """Whether a group shares memory; a collective call."""
    everyone.barrier()
    return everyone._channel is not None
