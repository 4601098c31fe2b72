"""Groups ranks by host and opens shared memory; all ranks agree, or all use gloo."""

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

import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from distrain import torch_internals
from distrain.communication.shared_memory.arena import Arena, MappedArena
from distrain.communication.shared_memory.channel import SharedMemoryChannel
from distrain.communication.shared_memory.control_block import CONTROL_BLOCK_BYTES, ControlBlock
from distrain.communication.shared_memory.hierarchical import HierarchicalChannel, HostChannels, LeaderGroup
from distrain.communication.shared_memory.peer import Peer
from distrain.communication.types import Channel, RankName
from distrain.health.process import Process

log = logging.getLogger(__name__)

#: Gathers every rank's plain data, in order of rank, by the group's own backend.
AllGatherJson = Callable[[Mapping[str, Any]], list[dict[str, Any]]]
_MAX_PROBLEM_LENGTH = 200


def host_identity() -> list[str]:
    """What ranks that can share memory have in common: a kernel, its network and process namespaces, and a host name.

    Ranks in different network namespaces count as different hosts, which is how a network is simulated in one kernel.

    Raises:
        OSError: The system doesn't tell.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return [boot, *(str(Path("/proc/self/ns", kind).readlink()) for kind in ("net", "pid")), socket.gethostname()]


class ChannelRegistry:
    """The channels of this process's groups.

    Attributes:
        enabled: Whether groups may share memory; must be the same on all ranks of a group.
    """

    def __init__(self) -> None:
        self.enabled = True
        self._lock = threading.Lock()
        self._channels: weakref.WeakKeyDictionary[dist.ProcessGroup, Channel | None] = weakref.WeakKeyDictionary()
        self._logged_problems: set[str] = set()

    def get_or_connect(self, group: dist.ProcessGroup, all_gather_json: AllGatherJson) -> Channel | None:
        """The channel of a group. The first call for a group is a collective, and all its ranks get the same answer.

        Args:
            group: A group of more than one rank.
            all_gather_json: Exchanges data over this group by its own backend.

        Returns:
            The channel, or ``None`` if the group must use its backend.
        """
        if not self.enabled or dist.get_backend(group) != "gloo":
            return None
        with self._lock:
            if group in self._channels:
                return self._channels[group]
        try:
            channel = _connect(group, all_gather_json)
        except _CannotShareMemory as problem:
            channel = None
            if str(problem) not in self._logged_problems:
                self._logged_problems.add(str(problem))
                log.warning("ranks of this host talk over the network, since they can't share memory: %s", problem)
        with self._lock:
            self._channels[group] = channel
        return channel

    def close_all(self) -> None:
        """Closes all channels, when their groups are destroyed."""
        with self._lock:
            for channel in self._channels.values():
                if channel is not None:
                    channel.close()
            self._channels.clear()
            self._logged_problems.clear()


#: The channels of this process.
channel_registry = ChannelRegistry()


class _CannotShareMemory(Exception):
    """Ranks of one host can't share memory; the message names the rank and the reason."""


def _connect(group: dist.ProcessGroup, all_gather_json: AllGatherJson) -> Channel | None:
    """Connects all ranks of a group; ``None`` if every rank is alone on its host."""
    try:
        identity = host_identity()
    except OSError:
        # If this rank has neighbours, they can't map its arena and report that. A rank alone on its host needs no more.
        identity = [socket.gethostname()]
    ranks = _agree({"problem": "", "place": identity, "token": secrets.randbits(62)}, all_gather_json)
    hosts: dict[tuple[str, ...], list[int]] = {}
    for rank, other in enumerate(ranks):
        hosts.setdefault(tuple(other["place"]), []).append(rank)
    own_rank, layout = dist.get_rank(group), list(hosts.values())
    if len(layout) == 1:
        return _connect_host(group, layout[0], all_gather_json)
    if len(layout) == len(ranks):
        return None
    try:
        # On all ranks, not only on those that use it, so that all or none go over the network.
        group_store = torch_internals.group_store(group)
    except OSError as error:
        raise _CannotShareMemory(str(error)) from error
    host_ranks = next(members for members in layout if own_rank in members)
    to_leader = _connect_host(group, host_ranks, all_gather_json)
    try:
        from_leader = _connect_host(group, host_ranks, all_gather_json)
    except _CannotShareMemory:
        if to_leader is not None:
            to_leader.close()
        raise
    host_channels = None
    if to_leader is not None and from_leader is not None:
        host_channels = HostChannels(to_leader, from_leader)
    leaders = None
    if own_rank == host_ranks[0]:
        # Made without torch.distributed.new_group, which names a group by how many groups the rank is in. Leaders can
        # be in different numbers of groups, and so might not agree on the name.
        store = PrefixStore(f"hosts/{ranks[0]['token']}", group_store)
        timeout = timedelta(seconds=torch_internals.group_timeout(group))
        leaders = cast(LeaderGroup, dist.ProcessGroupGloo(store, layout.index(host_ranks), len(layout), timeout))
    return HierarchicalChannel(own_rank, layout, host_channels, leaders)


def _connect_host(
    group: dist.ProcessGroup, host_ranks: list[int], all_gather_json: AllGatherJson
) -> SharedMemoryChannel | None:
    """Opens shared memory among the ranks of this host. A collective of the whole group.

    Args:
        group: The group.
        host_ranks: Its ranks on this host, by their numbers in the group.
        all_gather_json: Exchanges data over the group.

    Returns:
        ``None`` for a rank that is alone on its host.

    Raises:
        _CannotShareMemory: A rank of the group that is not alone on its host can't share memory.
    """
    local_rank = host_ranks.index(dist.get_rank(group))
    arena, description = _allocate_arena() if len(host_ranks) > 1 else (None, {"problem": ""})
    peers: dict[int, Peer] = {}
    problem = ""
    try:
        ranks = _agree(description, all_gather_json)
        try:
            peers = _map_peers([ranks[rank] for rank in host_ranks], local_rank, torch_internals.group_timeout(group))
        except (OSError, ValueError) as error:
            problem = str(error)[:_MAX_PROBLEM_LENGTH]
        _agree({"problem": problem}, all_gather_json)
    except _CannotShareMemory:
        if arena is not None:
            arena.close()
        raise
    if arena is None:
        return None
    return SharedMemoryChannel(local_rank, RankName(dist.get_rank(), socket.gethostname()), arena, peers)


def _agree(description: dict[str, Any], all_gather_json: AllGatherJson) -> list[dict[str, Any]]:
    """Every rank's description, with its name and process.

    Raises:
        _CannotShareMemory: A rank describes a problem.
    """
    process = Process.current()
    name = {"rank": dist.get_rank(), "host": socket.gethostname(), "pid": process.pid, "started": process.started}
    ranks = all_gather_json({**name, **description})
    for other in ranks:
        if other["problem"]:
            raise _CannotShareMemory(f"rank {other['rank']} on {other['host']}: {other['problem']}")
    return ranks


def _allocate_arena() -> tuple[Arena | None, dict[str, Any]]:
    """This rank's arena, and a description by which its peers can map it, or of the problem if there is no arena."""
    try:
        if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
            # See distrain.communication.shared_memory.control_block for the reason.
            raise OSError(f"not on {sys.platform} {platform.machine()}")
        if _address_space_is_limited():
            raise OSError("the address space of a process is limited here (ulimit -v), and arenas need much of it")
        arena = Arena(CONTROL_BLOCK_BYTES)
    except (OSError, AttributeError) as error:
        # A Python that was built against an old C library has no memfd_create.
        return None, {"problem": str(error)[:_MAX_PROBLEM_LENGTH]}
    token = secrets.randbits(62)
    ControlBlock(arena.words).token = token
    return arena, {"problem": "", "descriptor": arena.descriptor, "token": token}


def _address_space_is_limited() -> bool:
    import resource  # not on every system

    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def _map_peers(descriptions: list[dict[str, Any]], local_rank: int, timeout: float) -> dict[int, Peer]:
    """Maps the arenas of the other ranks of this host.

    Args:
        descriptions: Those of all ranks of this host.
        local_rank: Index of this rank among them.
        timeout: Longest wait for a peer in a collective, in seconds.
    """
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    oversubscribed = max(len(descriptions), local_world_size) > len(os.sched_getaffinity(0))
    peers: dict[int, Peer] = {}
    for index, other in enumerate(descriptions):
        if index == local_rank:
            continue
        arena = MappedArena(int(other["pid"]), int(other["descriptor"]))
        name, process = RankName(other["rank"], other["host"]), Process(other["pid"], other["started"])
        peers[index] = Peer(name, process, arena, timeout, oversubscribed=oversubscribed, migrates=index < local_rank)
        if peers[index].token != other["token"]:
            raise OSError(f"process id {other['pid']} belongs to another process on this rank than on its own")
    return peers
