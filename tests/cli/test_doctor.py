"""The doctor on one machine: what it prints, sets and refuses."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distrain.cli import doctor
from distrain.cli.doctor import DoctorSettings
from distrain.errors import ConfigError, Failed
from distrain.runtime.world import World
from distrain.tools.doctor import interfaces
from tests.harness import run_ranks, run_ranks_to_the_end
from tests.runs import LAUNCH


def settings(**changes: Any) -> DoctorSettings:
    made = DoctorSettings(None, None, None, 5.0, None, None, None, False)
    for key, value in changes.items():
        setattr(made, key, value)
    return made


@pytest.fixture(autouse=True)
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


def test_one_process_examines_its_machine(capfd: pytest.CaptureFixture[str]) -> None:
    assert doctor.run(settings(), []) == []
    said = capfd.readouterr().out
    assert "rank  host" in said
    assert said.endswith("nothing is wrong\n")


def test_what_is_wrong_ends_with_a_failure(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Failed):
        doctor.run(settings(threads=1000), [])
    assert "1 rank(s) of 1000 threads each" in capfd.readouterr().out


def examine(output: str) -> list[str]:
    return [finding.kind for finding in doctor.run(settings(output=output), [])]


def test_ranks_of_one_host_measure_all_reduce(tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    assert run_ranks(examine, 2, str(output)) == [[], []]
    found = json.loads(output.read_text())
    assert [each["rank"] for each in found["ranks"]] == [0, 1]
    (reduction,) = found["all_reduce"]
    assert reduction["backend"] == "gloo"
    assert reduction["error"] == ""
    sizes = [sent for sent, _ in reduction["points"]]
    assert sizes == sorted(sizes)
    assert sizes[0] < 2000 < sizes[-1]
    # One host has no links.
    assert found["pairs"] == []


def examine_all_but_the_last() -> str:
    world = World.from_environment()
    if world.rank == world.size - 1:
        return "stayed away"
    try:
        doctor.run(settings(wait=1.5), [])
    except Failed:
        return "failed"
    return "found nothing"


def test_rank_that_stays_away_is_missed_by_the_others() -> None:
    assert run_ranks_to_the_end(examine_all_but_the_last, 3, timeout=30) == ["failed", "failed", "stayed away"]


def test_place_that_refuses_or_does_not_resolve_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(Failed):
        doctor.run(settings(address=f"127.0.0.1:{port}", ranks=2, rank=1, wait=0.3), [])
    said = capfd.readouterr().out
    assert f"can't reach port {port} of 127.0.0.1, where ranks meet, within 0.3 s: refused" in said
    assert f"open TCP port {port}" in said
    with pytest.raises(Failed):
        doctor.run(settings(address="no-such-host.invalid:1234", ranks=2, rank=1, wait=0.3), [])
    said = capfd.readouterr().out
    assert "the name 'no-such-host.invalid', where ranks meet, doesn't resolve" in said


def test_port_that_is_taken_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(Failed):
        doctor.run(settings(address=f"127.0.0.1:{server.getsockname()[1]}", ranks=2, rank=0, wait=1), [])
    assert "can't serve port" in capfd.readouterr().out


def test_export_prints_lines_for_a_shell(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(interfaces, "addresses", lambda: {"lo": "127.0.0.1", "eth7": "10.0.0.2"})
    monkeypatch.setattr(interfaces, "towards", lambda *_: "10.0.0.2")
    assert doctor.run(settings(export=True, address="10.0.0.1:29400"), []) == []
    assert capfd.readouterr().out == "export GLOO_SOCKET_IFNAME=eth7\nexport NCCL_SOCKET_IFNAME=eth7\n"


def test_command_runs_with_the_interface_set() -> None:
    host = next((name for name, address in interfaces.addresses().items() if address == interfaces.towards()), None)
    if host is None:
        pytest.skip("no interface leads out of this machine")
    done = subprocess.run(
        [sys.executable, str(LAUNCH / "doctor.py"), "--", "sh", "-c", "echo $GLOO_SOCKET_IFNAME; exit 3"],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == f"{host}\n"
    assert done.returncode == 3


def test_mistakes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^address: 2 ranks need HOST:PORT"):
        doctor.run(settings(ranks=2, rank=0), [])
    with pytest.raises(ConfigError, match=r"^address=host: must be HOST:PORT"):
        doctor.run(settings(ranks=2, rank=0, address="host"), [])
    with pytest.raises(ConfigError, match=r"^rank=2: there are 2 ranks"):
        doctor.run(settings(ranks=2, rank=2, address="host:1"), [])
    with pytest.raises(ConfigError, match=r"^expect=fast: must be a rate"):
        doctor.run(settings(expect="fast"), [])
