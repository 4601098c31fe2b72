"""The doctor finds faults on hosts of a test network and names each, with its host and what to type."""

from __future__ import annotations

import contextlib
import importlib.metadata
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


def examine(faults: Mapping[int, Mapping[str, Any]], wait: float, output: str) -> str:
    """Runs the doctor on a host, with the host's faults injected into its process, and returns what it prints."""
    fault = faults.get(int(os.environ["RANK"]), {})
    if fault.get("absent"):
        return ""
    os.environ.update({"OMP_NUM_THREADS": "1", **fault.get("variables", {})})
    sys.path[:0] = fault.get("path", [])
    if "clock" in fault:
        real_time = time.time
        time.time = lambda: real_time() + fault["clock"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(Failed):
        doctor.run(DoctorSettings(None, None, None, wait, None, None, output, False), [])
    return printed.getvalue()


def on_host(net: VirtualNetwork, host: int, *line: str) -> None:
    """Runs a command on a host."""
    subprocess.run(["nsenter", "--target", str(net.namespace_pid(host)), "--net", *line], check=True)


Problems = dict[str, list[tuple[str, str]]]


def findings(path: Path) -> Problems:
    """Returns problem and advice of each finding that is not only a note, by kind."""
    problems: Problems = {}
    for finding in json.loads(path.read_text())["findings"]:
        if finding["wrong"]:
            problems.setdefault(finding["kind"], []).append((finding["problem"], finding["advice"]))
    return problems


@pytest.fixture(scope="module")
def four_faults(tmp_path_factory: pytest.TempPathFactory) -> Problems:
    """One fault on each of four hosts."""
    folder = tmp_path_factory.mktemp("faults")
    old = folder / "path" / "torch-2.6.0.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.6.0\n")
    # Recent releases of torch find their backends there.
    entry_points = importlib.metadata.distribution("torch").read_text("entry_points.txt")
    (old / "entry_points.txt").write_text(entry_points or "")
    faults = {
        0: {"variables": {"OMP_NUM_THREADS": "512"}},
        1: {"path": [str(old.parent)]},
        2: {"clock": 120.0},
    }
    with VirtualNetwork(4) as net:
        net.set_rate("300mbit", [0, 1, 2])
        net.set_rate("5mbit", [3])
        run_on_hosts(net, examine, faults, 20.0, str(folder / "report.json"))
    return findings(folder / "report.json")


def test_four_faults_are_reported_and_nothing_else(four_faults: Problems) -> None:
    assert set(four_faults) == {"torch version", "slow link", "clock skew", "too many threads"}


def test_different_torch_version_is_reported(four_faults: Problems) -> None:
    ((problem, advice),) = four_faults["torch version"]
    assert problem.startswith("torch is 2.6.0 on host1; the others have ")
    assert advice.startswith("on host1: pip install 'torch==")


def test_slow_link_is_reported(four_faults: Problems) -> None:
    ((problem, _),) = four_faults["slow link"]
    assert problem.startswith("all traffic from host3 is slow: ")
    measured = float(problem.removeprefix("all traffic from host3 is slow: ").split()[0])
    assert 3.5 < measured < 7
    assert "Mbit/s" in problem


def test_clock_skew_is_reported(four_faults: Problems) -> None:
    ((problem, advice),) = four_faults["clock skew"]
    assert problem.startswith("the clock of host2 is 120.0 s ahead of that of host0")
    assert advice.startswith("on host2: timedatectl")


def test_too_many_threads_are_reported(four_faults: Problems) -> None:
    ((problem, advice),) = four_faults["too many threads"]
    assert problem.startswith("host0 has ")
    assert "1 rank(s) of 512 threads each" in problem
    assert "export OMP_NUM_THREADS=" in advice


@pytest.fixture(scope="module")
def names_and_interfaces(tmp_path_factory: pytest.TempPathFactory) -> Problems:
    """Three hosts without name service: one sets its interface, one sets a wrong one, one sets none."""
    output = tmp_path_factory.mktemp("names") / "report.json"
    faults = {1: {"variables": {"GLOO_SOCKET_IFNAME": "lo"}}, 2: {"variables": {"GLOO_SOCKET_IFNAME": ""}}}
    with VirtualNetwork(3, names=False) as net:
        run_on_hosts(net, examine, faults, 20.0, str(output))
    return findings(output)


def test_wrong_interface_is_reported(names_and_interfaces: Problems) -> None:
    first, _ = names_and_interfaces["wrong interface"]
    assert first == (
        "rank 1 on host1 would use lo (127.0.0.1), which no other host can reach: GLOO_SOCKET_IFNAME=lo",
        "on host1: export GLOO_SOCKET_IFNAME=eth0",
    )


def test_unresolvable_host_name_is_reported(names_and_interfaces: Problems) -> None:
    ((problem, advice),) = names_and_interfaces["host name"]
    assert problem.startswith("host2 can't resolve its own name")
    assert f"on host2: echo '{address(2)} host2' >> /etc/hosts" in advice
    assert "export GLOO_SOCKET_IFNAME=eth0" in advice
    # gloo takes the loopback because of that.
    assert names_and_interfaces["wrong interface"][1][0].startswith("rank 2 on host2 would use lo")


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory: pytest.TempPathFactory) -> Problems:
    """Four hosts: the second and the third cannot reach each other, and the fourth never starts."""
    output = tmp_path_factory.mktemp("ports") / "report.json"
    with VirtualNetwork(4) as net:
        on_host(net, 1, "ip", "route", "add", "blackhole", address(2))
        run_on_hosts(net, examine, {3: {"absent": True}}, 3.0, str(output))
    return findings(output)


def test_closed_port_is_reported(cut_off: Problems) -> None:
    problems = [problem for problem, _ in cut_off["closed port"]]
    assert problems == [
        f"host1 can't connect to host2 ({address(2)}: this host's own rules forbid it)",
        f"host2 can't connect to host1 ({address(1)}: no answer: a firewall drops packets, or the host is down)",
    ]
    assert f"-s {address(1)} -j ACCEPT" in cut_off["closed port"][0][1]


def test_rank_that_does_not_start_is_reported(cut_off: Problems) -> None:
    ((problem, advice),) = cut_off["missing rank"]
    assert problem == "rank 3 never arrived within 3 s"
    assert "host0, host1, host2" in advice


def test_closed_rendezvous_port_is_reported(tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    with VirtualNetwork(2) as net:
        # Replies from that port are dropped, as by a firewall.
        on_host(net, 0, "ip", "rule", "add", "ipproto", "tcp", "sport", "29501", "blackhole")
        _, printed = run_on_hosts(net, examine, {}, 2.0, str(output))
    assert f"can't reach port 29501 of {address(0)}, where ranks meet, within 2 s: no answer: a firewall" in printed
    assert "open TCP port 29501 on that host" in printed
    assert findings(output).keys() == {"missing rank"}
