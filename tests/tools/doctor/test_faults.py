"""Faults planted on hosts of a test network: the doctor names each, with its host and what to type."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from distrain.cli import doctor
from distrain.cli.doctor import DoctorSettings
from distrain.errors import Failed
from distrain.tools.testnet.network import VirtualNetwork, address
from tests.hosts import needs_network, run_on_hosts

pytestmark = needs_network


def examine(plants: Mapping[int, Mapping[str, Any]], wait: float, output: str) -> str:
    """What a host's doctor prints, with the host's faults planted in its own process."""
    plant = plants.get(int(os.environ["RANK"]), {})
    if plant.get("stays away"):
        return ""
    os.environ.update({"OMP_NUM_THREADS": "1", **plant.get("variables", {})})
    sys.path[:0] = plant.get("path", [])
    if "clock" in plant:
        right = time.time
        time.time = lambda: right() + plant["clock"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(Failed):
        doctor.run(DoctorSettings(None, None, None, wait, None, None, output, False), [])
    return said.getvalue()


def on_host(net: VirtualNetwork, host: int, *line: str) -> None:
    """Runs a command on a host."""
    subprocess.run(["nsenter", "--target", str(net.namespace_pid(host)), "--net", *line], check=True)


Found = dict[str, list[tuple[str, str]]]


def findings(path: Path) -> Found:
    """Problem and advice of what is wrong, by kind."""
    found: Found = {}
    for finding in json.loads(path.read_text())["findings"]:
        if finding["wrong"]:
            found.setdefault(finding["kind"], []).append((finding["problem"], finding["advice"]))
    return found


@pytest.fixture(scope="module")
def four_faults(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """One on each of four hosts."""
    folder = tmp_path_factory.mktemp("faults")
    old = folder / "path" / "torch-2.6.0.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.6.0\n")
    plants = {
        0: {"variables": {"OMP_NUM_THREADS": "512"}},
        1: {"path": [str(old.parent)]},
        2: {"clock": 120.0},
    }
    with VirtualNetwork(4) as net:
        net.set_rate("300mbit", [0, 1, 2])
        net.set_rate("5mbit", [3])
        run_on_hosts(net, examine, plants, 20.0, str(folder / "found.json"))
    return findings(folder / "found.json")


def test_four_faults_are_found_and_nothing_else(four_faults: Found) -> None:
    assert set(four_faults) == {"torch version", "slow link", "clock skew", "too many threads"}


def test_other_torch_version(four_faults: Found) -> None:
    ((problem, advice),) = four_faults["torch version"]
    assert problem.startswith("torch is 2.6.0 on host1; the others have ")
    assert advice.startswith("on host1: pip install 'torch==")


def test_slow_link(four_faults: Found) -> None:
    ((problem, _),) = four_faults["slow link"]
    assert problem.startswith("everything from host3 is slow: ")
    measured = float(problem.removeprefix("everything from host3 is slow: ").split()[0])
    assert 3.5 < measured < 7
    assert "Mbit/s" in problem


def test_clock_skew(four_faults: Found) -> None:
    ((problem, advice),) = four_faults["clock skew"]
    assert problem.startswith("the clock of host2 is 120.0 s ahead of that of host0")
    assert advice.startswith("on host2: timedatectl")


def test_too_many_threads(four_faults: Found) -> None:
    ((problem, advice),) = four_faults["too many threads"]
    assert problem.startswith("host0 has ")
    assert "1 rank(s) of 512 threads each" in problem
    assert "export OMP_NUM_THREADS=" in advice


@pytest.fixture(scope="module")
def names_and_interfaces(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Three hosts without name service: one names its interface, one the wrong one, one none."""
    output = tmp_path_factory.mktemp("names") / "found.json"
    plants = {1: {"variables": {"GLOO_SOCKET_IFNAME": "lo"}}, 2: {"variables": {"GLOO_SOCKET_IFNAME": ""}}}
    with VirtualNetwork(3, names=False) as net:
        run_on_hosts(net, examine, plants, 20.0, str(output))
    return findings(output)


def test_wrong_interface(names_and_interfaces: Found) -> None:
    first, _ = names_and_interfaces["wrong interface"]
    assert first == (
        "rank 1 on host1 would use lo (127.0.0.1), which no other host can reach: GLOO_SOCKET_IFNAME=lo",
        "on host1: export GLOO_SOCKET_IFNAME=eth0",
    )


def test_host_name_that_does_not_resolve(names_and_interfaces: Found) -> None:
    ((problem, advice),) = names_and_interfaces["host name"]
    assert problem.startswith("host2 can't resolve its own name")
    assert f"on host2: echo '{address(2)} host2' >> /etc/hosts" in advice
    assert "export GLOO_SOCKET_IFNAME=eth0" in advice
    # And what follows from it.
    assert names_and_interfaces["wrong interface"][1][0].startswith("rank 2 on host2 would use lo")


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Four hosts: the second and the third can't talk, and the fourth never starts."""
    output = tmp_path_factory.mktemp("ports") / "found.json"
    with VirtualNetwork(4) as net:
        on_host(net, 1, "ip", "route", "add", "blackhole", address(2))
        run_on_hosts(net, examine, {3: {"stays away": True}}, 3.0, str(output))
    return findings(output)


def test_closed_port(cut_off: Found) -> None:
    problems = [problem for problem, _ in cut_off["closed port"]]
    assert problems == [
        f"host1 can't connect to host2 ({address(2)}: this host's own rules forbid it)",
        f"host2 can't connect to host1 ({address(1)}: no answer: a firewall drops packets, or the host is down)",
    ]
    assert f"-s {address(1)} -j ACCEPT" in cut_off["closed port"][0][1]


def test_rank_that_never_arrives(cut_off: Found) -> None:
    ((problem, advice),) = cut_off["missing rank"]
    assert problem == "rank 3 never arrived within 3 s"
    assert "host0, host1, host2" in advice


def test_port_where_ranks_meet_is_closed(tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    with VirtualNetwork(2) as net:
        # Answers from there get lost, as behind a firewall.
        on_host(net, 0, "ip", "rule", "add", "ipproto", "tcp", "sport", "29501", "blackhole")
        _, said = run_on_hosts(net, examine, {}, 2.0, str(output))
    assert f"can't reach port 29501 of {address(0)}, where ranks meet, within 2 s: no answer: a firewall" in said
    assert "open TCP port 29501 on that host" in said
    assert findings(output).keys() == {"missing rank"}
