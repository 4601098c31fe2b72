"""How much memory a rank may take for a training."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from distrain.config.schema import Config
from distrain.runtime.world import World

#: Share of what is free that a training may take: libraries allocate some that nobody counts.
_SHARE = 0.9
MIB = 2**20
#: The limits of a process, by what ``/proc/self/status`` calls that which they limit.
_LIMITS = {"VmSize": "RLIMIT_AS", "VmData": "RLIMIT_DATA"}


def memory_limit(config: Config, world: World, device: torch.device, held: int) -> float | None:
    """Bytes that a rank's tensors may take.

    Args:
        config: The run's configuration, whose ``runtime.memory_limit_mb`` counts if it is set.
        world: This rank's place.
        device: Where it computes.
        held: Bytes that its tensors take already.

    Returns:
        ``None`` if nobody knows.
    """
    configured = config.runtime.memory_limit_mb
    if configured is not None:
        return configured * MIB
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch has reserved and not allocated is free too.
        return held + _SHARE * (free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    left = free_memory(world.local_size)
    return None if left is None else held + _SHARE * left


def free_memory(ranks: int, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Bytes that this process may still allocate if others like it take as much.

    Args:
        ranks: Processes that share what the system and its cgroups leave. Limits of a process are its own.
        proc: Where Linux tells about memory.
        cgroups: Where it tells about cgroups.

    Returns:
        ``None`` where the system doesn't tell.
    """
    shared = [*_available(proc / "meminfo"), *_left_in_cgroups(proc, cgroups)]
    return min([*(size / ranks for size in shared), *_left_by_limits(proc)], default=None)


def _available(path: Path) -> list[int]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]


class _CgroupFiles(NamedTuple):
    """What a version of cgroups calls the files of a group's memory.

    Attributes:
        limit: Most bytes of the group.
        used: Its bytes now, with those of the groups in it.
        cached: The entry of ``memory.stat`` that counts what the system has kept of files and hasn't used lately.
    """

    limit: str
    used: str
    cached: str

    def left(self, folder: Path) -> list[int]:
        """Bytes that a cgroup leaves; none if it has no limit."""
        limit, used, statistics = folder / self.limit, folder / self.used, folder / "memory.stat"
        if not limit.exists() or not used.exists() or not (text := limit.read_text().strip()).isdecimal():
            return []
        entries = dict(line.split() for line in statistics.read_text().splitlines()) if statistics.exists() else {}
        # The system frees these pages before it refuses memory; of files that were read, a group is often full.
        taken = int(used.read_text()) - int(entries.get(self.cached, 0))
        return [max(int(text) - taken, 0)]


_FIRST = _CgroupFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_SECOND = _CgroupFiles("memory.max", "memory.current", "inactive_file")


def _left_in_cgroups(proc: Path, cgroups: Path) -> list[int]:
    """What the cgroup of this process, and each one around it, leaves; of cgroups of both versions.

    A container may see its own cgroup as the root of the tree and yet be told its path in the host's tree. Folders that
    are not there are passed over, so that the root is read in any case.
    """
    own = proc / "self" / "cgroup"
    left = []
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, name = line.split(":", 2)
        if not controllers:
            # Where both versions are in use, the second one has a folder of its own.
            roots, version = [cgroups, cgroups / "unified"], _SECOND
        elif "memory" in controllers.split(","):
            roots, version = [cgroups / "memory"], _FIRST
        else:
            continue
        for root in roots:
            folder = root / name.lstrip("/")
            for each in (folder, *folder.parents):
                left += version.left(each)
                if each == root:
                    break
    return left


def _left_by_limits(proc: Path) -> list[int]:
    """What this process's own limits leave: of its addresses, and of its data."""
    try:
        import resource
    except ImportError:
        return []
    status = proc / "self" / "status"
    entries = dict(line.split(":", 1) for line in status.read_text().splitlines()) if status.exists() else {}
    left = []
    for name, limit in _LIMITS.items():
        most, _ = resource.getrlimit(getattr(resource, limit))
        if name in entries and most != resource.RLIM_INFINITY:
            left.append(max(most - 1024 * int(entries[name].split()[0]), 0))
    return left
