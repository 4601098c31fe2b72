"""Which ranks of a group share memory: those of one host each, if all can that have neighbours; on which all agree."""

from __future__ import annotations

import logging
import os
import platform
import secrets
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _get_process_group_store

from distrain.communication.shared_memory.arena import Arena, Memory
from distrain.communication.shared_memory.channel import SharedMemoryChannel
from distrain.communication.shared_memory.control_block import BOARD_SIZE, Board
from distrain.communication.shared_memory.hierarchical import HierarchicalChannel, Neighbours, Network
from distrain.communication.shared_memory.peer import Peer
from distrain.communication.types import Channel, RankName
from distrain.health.process import Process

log = logging.getLogger(__name__)

#: Gives every rank's plain data to all, in order of rank, by other means.
Share = Callable[[Mapping[str, Any]], list[dict[str, Any]]]
_LONGEST_REASON = 200


def place() -> list[str]:
    """What is the same for ranks that may share memory: one kernel, its namespaces of network and processes, one name.

    Ranks in network namespaces of their own are hosts of a network that somebody set up in one kernel.

    Raises:
        OSError: The system doesn't say.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return [boot, *(str(Path("/proc/self/ns", kind).readlink()) for kind in ("net", "pid")), socket.gethostname()]


class ChannelRegistry:
    """The groups of this process that share memory.

    Attributes:
        enabled: Whether any may; must be the same on all ranks of a group.
    """

    def __init__(self) -> None:
        self.enabled = True
        self._lock = threading.Lock()
        self._channels: weakref.WeakKeyDictionary[dist.ProcessGroup, Channel | None] = weakref.WeakKeyDictionary()
        self._told: set[str] = set()

    def get_or_connect(self, group: dist.ProcessGroup, share: Share) -> Channel | None:
        """What carries a group's collectives; the first call is a collective, whose outcome all its ranks share.

        Args:
            group: Of more than one rank.
            share: Over this group, by its own backend.

        Returns:
            ``None`` if the group's backend must do.
        """
        if not self.enabled or dist.get_backend(group) != "gloo":
            return None
        with self._lock:
            if group in self._channels:
                return self._channels[group]
        try:
            carrier = _meet(group, share)
        except _Apart as problem:
            carrier = None
            if str(problem) not in self._told:
                self._told.add(str(problem))
                log.warning("ranks of this host talk over the network, since they can't share memory: %s", problem)
        with self._lock:
            self._channels[group] = carrier
        return carrier

    def close_all(self) -> None:
        """The groups are no more."""
        with self._lock:
            for carrier in self._channels.values():
                if carrier is not None:
                    carrier.close()
            self._channels.clear()
            self._told.clear()


#: Those of this process.
channel_registry = ChannelRegistry()


class _Apart(Exception):
    """Ranks that could share memory can't: which one, and why."""


def _meet(group: dist.ProcessGroup, share: Share) -> Channel | None:
    try:
        here = place()
    except OSError:
        # Where ranks with neighbours can't share memory they will say so; one without need not.
        here = [socket.gethostname()]
    told = _agreed({"problem": "", "place": here, "token": secrets.randbits(62)}, share)
    hosts: dict[tuple[str, ...], list[int]] = {}
    for rank, each in enumerate(told):
        hosts.setdefault(tuple(each["place"]), []).append(rank)
    own, layout = dist.get_rank(group), list(hosts.values())
    if len(layout) == 1:
        return _channel(group, layout[0], share)
    if len(layout) == len(told):
        return None
    near = next(ranks for ranks in layout if own in ranks)
    up = _channel(group, near, share)
    try:
        down = _channel(group, near, share)
    except _Apart:
        if up is not None:
            up.close()
        raise
    network = None
    if own == near[0]:
        # Not a group by torch.distributed.new_group, whose name counts the groups that a rank is in: first ranks are in
        # more of them than others, so that two of them might not agree on it.
        store = PrefixStore(f"hosts/{told[0]['token']}", _get_process_group_store(group))
        limit = timedelta(seconds=_limit(group))
        network = cast(Network, dist.ProcessGroupGloo(store, layout.index(near), len(layout), limit))
    return HierarchicalChannel(
        own, layout, Neighbours(up, down) if up is not None and down is not None else None, network
    )


def _channel(group: dist.ProcessGroup, near: list[int], share: Share) -> SharedMemoryChannel | None:
    """What the ranks of this host share; all of the group call this at once, and it takes all that have neighbours.

    Returns:
        ``None`` for a rank without neighbours.

    Raises:
        _Apart: Any rank of the group can't.
    """
    place_here = near.index(dist.get_rank(group))
    arena, mine = _offer() if len(near) > 1 else (None, {"problem": ""})
    peers: dict[int, Peer] = {}
    problem = ""
    try:
        everyone = _agreed(mine, share)
        try:
            peers = _open([everyone[rank] for rank in near], place_here, _limit(group))
        except (OSError, ValueError) as error:
            problem = str(error)[:_LONGEST_REASON]
        _agreed({"problem": problem}, share)
    except _Apart:
        if arena is not None:
            arena.close()
        raise
    if arena is None:
        return None
    return SharedMemoryChannel(place_here, RankName(dist.get_rank(), socket.gethostname()), arena, peers)


def _agreed(mine: dict[str, Any], share: Share) -> list[dict[str, Any]]:
    """What every rank tells, if none tells of a problem."""
    own = Process.current()
    who = {"rank": dist.get_rank(), "host": socket.gethostname(), "pid": own.pid, "started": own.started}
    everyone = share({**who, **mine})
    for each in everyone:
        if each["problem"]:
            raise _Apart(f"rank {each['rank']} on {each['host']}: {each['problem']}")
    return everyone


def _offer() -> tuple[Arena | None, dict[str, Any]]:
    """This rank's memory, if it has any to share, and what its peers need to know."""
    try:
        if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
            # See distrain.communication.shared_memory.control_block for why.
            raise OSError(f"not on {sys.platform} {platform.machine()}")
        if _addresses_are_limited():
            raise OSError("the addresses of a process are limited here (ulimit -v), and arenas take many")
        arena = Arena(BOARD_SIZE)
    except (OSError, AttributeError) as error:
        # A Python that was built against an old C library has no memfd_create.
        return None, {"problem": str(error)[:_LONGEST_REASON]}
    token = secrets.randbits(62)
    Board(arena.words).token = token
    return arena, {"problem": "", "descriptor": arena.descriptor, "token": token}


def _addresses_are_limited() -> bool:
    import resource  # not on every system

    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def _open(everyone: list[dict[str, Any]], rank: int, limit: float) -> dict[int, Peer]:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    crowded = max(len(everyone), local) > len(os.sched_getaffinity(0))
    peers: dict[int, Peer] = {}
    for index, each in enumerate(everyone):
        if index == rank:
            continue
        memory = Memory(int(each["pid"]), int(each["descriptor"]))
        process = Process(each["pid"], each["started"])
        peers[index] = Peer(
            RankName(each["rank"], each["host"]), process, memory, limit, crowded=crowded, moves=index < rank
        )
        if peers[index].token != each["token"]:
            raise OSError(f"process {each['pid']} is another here than for itself")
    return peers


def _limit(group: dist.ProcessGroup) -> float:
    """Seconds that the group's collectives may take."""
    seconds: float = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    return seconds
