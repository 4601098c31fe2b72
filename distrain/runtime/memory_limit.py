"""How much memory a rank may take for a training."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from distrain.config.schema import Config
from distrain.runtime.world import World

#: Share of what is free that a training may take: libraries allocate some that nobody counts.
_SHARE = 0.9
MIB = 2**20


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
    free_of_host = free_memory()
    return None if free_of_host is None else held + _SHARE * free_of_host / world.local_size


def free_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that processes like this one may still allocate: what the system, its cgroup and its limit leave.

    Args:
        proc: Where Linux tells about memory.
        cgroups: Where it tells about cgroups.

    Returns:
        ``None`` where the system doesn't tell.
    """
    found = [*_available(proc / "meminfo"), *_left_in_cgroups(proc, cgroups), *_left_in_address_space(proc)]
    return min(found, default=None)


def _available(path: Path) -> list[int]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]


def _left_in_cgroups(proc: Path, cgroups: Path) -> list[int]:
    """What the cgroup of this process, and each one around it, leaves; of cgroups of version 2."""
    own = proc / "self" / "cgroup"
    lines = own.read_text().splitlines() if own.exists() else []
    names = [line.removeprefix("0::") for line in lines if line.startswith("0::")]
    left = []
    for name in names:
        folder = cgroups / name.lstrip("/")
        for each in (folder, *folder.parents):
            limit, current = each / "memory.max", each / "memory.current"
            if limit.exists() and current.exists() and (text := limit.read_text().strip()).isdecimal():
                left.append(max(int(text) - int(current.read_text()), 0))
            if each == cgroups:
                break
    return left


def _left_in_address_space(proc: Path) -> list[int]:
    try:
        import resource
    except ImportError:
        return []
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    statm = proc / "self" / "statm"
    if limit == resource.RLIM_INFINITY or not statm.exists():
        return []
    return [max(limit - int(statm.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE"), 0)]
