"""How much memory a rank may take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distrain.runtime.memory_limit import MIB, free_memory, memory_limit
from distrain.runtime.world import World
from tests.runs import compose

CPU = torch.device("cpu")


GIB = 2**30


def system(folder: Path, cgroup: str) -> tuple[Path, Path]:
    """Files as Linux has them: 8 GiB are available.

    Args:
        folder: For the files.
        cgroup: This process's lines of ``/proc/self/cgroup``.
    """
    proc = folder / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable: 8388608 kB\n")
    (proc / "self" / "cgroup").write_text(f"{cgroup}\n")
    return proc, folder / "cgroup"


def write(folder: Path, files: dict[str, object]) -> None:
    """Files of a cgroup."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(f"{content}\n")


FIRST = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
SECOND = ("memory.max", "memory.current", "inactive_file")
#: What a cgroup of the first version has as its limit if it has none.
UNLIMITED = 2**63 - 4096


@pytest.mark.parametrize(
    ("lines", "root", "names", "unlimited"),
    [
        pytest.param("0::/job/step", "", SECOND, "max", id="second version"),
        pytest.param("4:memory:/job/step\n1:cpu:/other\n0::/", "memory", FIRST, UNLIMITED, id="first version"),
        pytest.param("4:cpu:/\n0::/job/step", "unified", SECOND, "max", id="both"),
    ],
)
def test_the_least_of_what_the_system_and_all_cgroups_leave(
    lines: str, root: str, names: tuple[str, str, str], unlimited: object, tmp_path: Path
) -> None:
    limit, used, cached = names
    proc, cgroups = system(tmp_path, lines)
    assert free_memory(1, proc, cgroups) == 8 * GIB
    # No limit of its own, but one of the cgroup around it, whose pages of files are freed first.
    write(cgroups / root / "job" / "step", {limit: unlimited, used: GIB})
    write(cgroups / root / "job", {limit: 4 * GIB, used: 3 * GIB, "memory.stat": f"rss 7\n{cached} {2 * GIB}"})
    assert free_memory(1, proc, cgroups) == 3 * GIB
    # The ranks of a host share it.
    assert free_memory(3, proc, cgroups) == GIB


def test_a_container_that_sees_its_cgroup_as_the_root(tmp_path: Path) -> None:
    proc, cgroups = system(tmp_path, "4:memory:/docker/5a1e\n0::/docker/5a1e")
    write(cgroups / "memory", {FIRST[0]: GIB, FIRST[1]: 0})
    assert free_memory(1, proc, cgroups) == GIB
    write(cgroups, {SECOND[0]: GIB, SECOND[1]: 2 * GIB})
    assert free_memory(1, proc, cgroups) == 0
    assert free_memory(1, tmp_path / "other", cgroups) is None


@pytest.mark.parametrize(("kind", "left"), [("RLIMIT_AS", 1), ("RLIMIT_DATA", 2)])
def test_limits_of_a_process_are_its_own(kind: str, left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    limits = {getattr(resource, kind): (3 * GIB, resource.RLIM_INFINITY)}
    monkeypatch.setattr(resource, "getrlimit", lambda of: limits.get(of, (resource.RLIM_INFINITY,) * 2))
    proc, cgroups = system(tmp_path, "0::/")
    write(proc / "self", {"status": f"Name:\tpython: a\nVmSize:\t{2 * 2**20} kB\nVmData:\t{2**20} kB"})
    # Four ranks share 8 GiB, and each may have 3.
    assert free_memory(1, proc, cgroups) == left * GIB
    assert free_memory(4, proc, cgroups) == min(left, 2) * GIB


def test_the_key_counts_and_else_the_ranks_of_a_host_share_what_is_free() -> None:
    config = compose("runtime.memory_limit_mb=12.5")
    assert memory_limit(config, World(0, 1, 0, 1, "host"), CPU, held=5) == 12.5 * MIB
    found = [memory_limit(compose(), World(0, size, 0, size, "host"), CPU, held=5) for size in (1, 4)]
    if free_memory(1) is not None:
        assert found[0] is not None
        assert found[1] is not None
        assert 0 < found[1] < found[0] / 2
