"""What a rank finds out about its host."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

from distrain.runtime.world import World
from distrain.tools.doctor import facts, interfaces
from distrain.tools.doctor.facts import RankFacts


def test_facts_of_this_host_survive_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    own = facts.gather_facts(World(1, 2, 0, 2, "here"), "127.0.0.1")
    assert RankFacts(**json.loads(json.dumps(dataclasses.asdict(own)))) == own
    assert own.label == "rank 1 on here"
    # The package may leave out what it was built for (+cu130).
    assert own.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert own.threads == 3
    assert own.cores == len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert own.route == "127.0.0.1"
    assert "gloo" in own.backends


def test_this_host_has_a_loopback_interface() -> None:
    own = interfaces.addresses()
    assert interfaces.interface_of("127.0.0.1", own) or not Path("/proc/net").exists()


def test_code_hash_changes_with_any_file(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.py").write_text("a = 1\n")
    before = facts.code_hash(tmp_path)
    assert facts.code_hash(tmp_path) == before
    (tmp_path / "inner" / "a.py").write_text("a = 2\n")
    assert facts.code_hash(tmp_path) != before


def test_cpu_limit_is_the_lowest_of_all_parent_control_groups(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    inner = root / "job" / "step"
    inner.mkdir(parents=True)
    own.write_text("0::/job/step\n")
    assert facts.cpu_quota(root, own) is None
    (inner / "cpu.max").write_text("max 100000\n")
    (root / "job" / "cpu.max").write_text("150000 100000\n")
    assert facts.cpu_quota(root, own) == 1.5
    (inner / "cpu.max").write_text("50000 100000\n")
    assert facts.cpu_quota(root, own) == 0.5


def test_cpu_limit_is_read_from_control_groups_version_1(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert facts.cpu_quota(tmp_path, tmp_path / "none") is None
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("250000\n")
    assert facts.cpu_quota(tmp_path, tmp_path / "none") == 2.5


def test_gpu_links_are_read_from_nvidia_smi() -> None:
    table = (
        "\t\x1b[4mGPU0\tGPU1\tGPU2\tCPU Affinity\tNUMA Affinity\x1b[0m\n"
        "GPU0\t X \tNV18\tSYS\t0-15\t0\n"
        "GPU1\tNV18\t X \tNODE\t0-15\t0\n"
        "GPU2\tSYS\tNODE\t X \t16-31\t1\n"
        "\n"
        "Legend:\n"
        "  SYS  = Connection traversing PCIe as well as the SMP interconnect\n"
    )
    assert facts.parse_topology(table, 3) == ["GPU0 - GPU1: NV18", "GPU0 - GPU2: SYS", "GPU1 - GPU2: NODE"]
