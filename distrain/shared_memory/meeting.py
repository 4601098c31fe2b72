"""Whether the ranks of a group are all on one host and can share memory, on which all of them agree."""

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
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distrain.processes import Process
from distrain.shared_memory.arena import Arena, Memory
from distrain.shared_memory.board import BOARD_SIZE, Board
from distrain.shared_memory.channel import Channel
from distrain.shared_memory.peers import Peer, Who

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


class Channels:
    """The groups of this process that share memory.

    Attributes:
        allowed: Whether any may; must be the same on all ranks of a group.
    """

    def __init__(self) -> None:
        self.allowed = True
        self._lock = threading.Lock()
        self._known: weakref.WeakKeyDictionary[dist.ProcessGroup, Channel | None] = weakref.WeakKeyDictionary()
        self._told: set[str] = set()

    def of(self, group: dist.ProcessGroup, share: Share) -> Channel | None:
        """A group's channel; the first call is a collective, whose outcome all ranks of the group share.

        Args:
            group: Of more than one rank.
            share: Over this group, by its own backend.

        Returns:
            ``None`` if the group's backend must do.
        """
        if not self.allowed or dist.get_backend(group) != "gloo":
            return None
        with self._lock:
            if group in self._known:
                return self._known[group]
        channel = self._meet(group, share)
        with self._lock:
            self._known[group] = channel
        return channel

    def drop(self) -> None:
        """The groups are no more."""
        with self._lock:
            for channel in self._known.values():
                if channel is not None:
                    channel.close()
            self._known.clear()
            self._told.clear()

    def _meet(self, group: dist.ProcessGroup, share: Share) -> Channel | None:
        who, own = Who(dist.get_rank(), socket.gethostname()), Process.own()
        arena, mine = _offer()
        everyone = share({"rank": who.rank, "host": who.host, "pid": own.pid, "started": own.started, **mine})
        problems = [_about(each) for each in everyone if each["problem"]]
        hosts = {tuple(each["place"]) for each in everyone if not each["problem"]}
        if arena is None or problems or len(hosts) > 1:
            self._do_without(arena, problems if len(hosts) < 2 else [])
            return None
        peers: dict[int, Peer] = {}
        problem = ""
        try:
            peers = _open(everyone, dist.get_rank(group), _limit(group))
        except (OSError, ValueError) as error:
            problem = str(error)
        answers = share({"rank": who.rank, "host": who.host, "problem": problem[:_LONGEST_REASON]})
        problems = [_about(each) for each in answers if each["problem"]]
        if problems:
            self._do_without(arena, problems)
            return None
        return Channel(dist.get_rank(group), who, arena, peers)

    def _do_without(self, arena: Arena | None, problems: list[str]) -> None:
        if arena is not None:
            arena.close()
        for problem in problems[:1]:
            if problem not in self._told:
                self._told.add(problem)
                log.warning("ranks of this host talk over the network, since they can't share memory: %s", problem)


#: Those of this process.
channels = Channels()


def _offer() -> tuple[Arena | None, dict[str, Any]]:
    """This rank's memory, if it has any to share, and what its peers need to know."""
    try:
        if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
            # See distrain.shared_memory.board for why.
            raise OSError(f"not on {sys.platform} {platform.machine()}")
        if _addresses_are_limited():
            raise OSError("the addresses of a process are limited here (ulimit -v), and arenas take many")
        here = place()
        arena = Arena(BOARD_SIZE)
    except (OSError, AttributeError) as error:
        # A Python that was built against an old C library has no memfd_create.
        return None, {"place": [], "problem": str(error)[:_LONGEST_REASON]}
    token = secrets.randbits(62)
    Board(arena.words).token = token
    return arena, {"place": here, "problem": "", "descriptor": arena.descriptor, "token": token}


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
            Who(each["rank"], each["host"]), process, memory, limit, crowded=crowded, moves=index < rank
        )
        if peers[index].token != each["token"]:
            raise OSError(f"process {each['pid']} is another here than for itself")
    return peers


def _about(told: Mapping[str, Any]) -> str:
    return f"rank {told['rank']} on {told['host']}: {told['problem']}"


def _limit(group: dist.ProcessGroup) -> float:
    """Seconds that the group's collectives may take."""
    seconds: float = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    return seconds
