"""Groups of ranks that share memory, for tests."""

from __future__ import annotations

import datetime
import os

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from distrain.communication.collectives import Communicator
from tests.harness import HANG_SECONDS


def store_of_test() -> TCPStore:
    """The store that the harness serves: what ranks tell each other beside their group."""
    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)


def form_group(limit: float = 10 * HANG_SECONDS) -> Communicator:
    """A communicator of all ranks, over a group with a timeout in seconds; by default no test would wait for it."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=PrefixStore("test", store_of_test()),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=datetime.timedelta(seconds=limit),
    )
    return Communicator(dist.group.WORLD)


def shares_memory(everyone: Communicator) -> bool:
    """Whether a group shares memory; a collective call."""
    everyone.barrier()
    return everyone._channel is not None
