"""How much memory a rank may take."""

from __future__ import annotations

from pathlib import Path

import torch

from distrain.runtime.memory_limit import MIB, free_memory, memory_limit
from distrain.runtime.world import World
from tests.runs import compose

CPU = torch.device("cpu")


def system(folder: Path, cgroup: str = "/job/step") -> tuple[Path, Path]:
    """Files as Linux has them: 8 GiB are available."""
    proc, cgroups = folder / "proc", folder / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable: 8388608 kB\n")
    (proc / "self" / "cgroup").write_text(f"0::{cgroup}\n")
    (cgroups / cgroup.lstrip("/")).mkdir(parents=True)
    return proc, cgroups


def test_the_least_of_what_the_system_and_all_cgroups_leave(tmp_path: Path) -> None:
    proc, cgroups = system(tmp_path)
    assert free_memory(proc, cgroups) == 8 * 2**30
    # No limit of its own, but one of the cgroup around it.
    for name, limit in (("job/step", "max"), ("job", str(4 * 2**30))):
        (cgroups / name / "memory.max").write_text(f"{limit}\n")
        (cgroups / name / "memory.current").write_text(f"{2**30}\n")
    assert free_memory(proc, cgroups) == 3 * 2**30
    assert free_memory(tmp_path / "other", cgroups) is None


def test_the_key_counts_and_else_the_ranks_of_a_host_share_what_is_free() -> None:
    config = compose("runtime.memory_limit_mb=12.5")
    assert memory_limit(config, World(0, 1, 0, 1, "host"), CPU, held=5) == 12.5 * MIB
    found = [memory_limit(compose(), World(0, size, 0, size, "host"), CPU, held=5) for size in (1, 4)]
    if free_memory() is not None:
        assert found[0] is not None
        assert found[1] is not None
        assert 0 < found[1] < found[0] / 2
