"""The doctor's command on one machine: what it prints, sets and refuses."""

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
from tests.harness import HANG_SECONDS, run_ranks, run_ranks_to_the_end
from tests.runs import LAUNCH


def settings(**changes: Any) -> DoctorSettings:
    result = DoctorSettings(None, None, None, 5.0, None, None, None, False)
    for key, value in changes.items():
        setattr(result, key, value)
    return result


@pytest.fixture(autouse=True)
def no_findings_about_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


def test_one_process_examines_only_its_machine(capfd: pytest.CaptureFixture[str]) -> None:
    assert doctor.run(settings(), []) == []
    printed = capfd.readouterr().out
    assert "rank  host" in printed
    assert printed.endswith("no problem found\n")


def test_problem_fails_the_command(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Failed):
        doctor.run(settings(threads=1000), [])
    assert "1 rank(s) of 1000 threads each" in capfd.readouterr().out


def examine(output: str) -> list[str]:
    return [finding.kind for finding in doctor.run(settings(output=output), [])]


def test_ranks_of_one_host_measure_all_reduce(tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    assert run_ranks(examine, 2, str(output)) == [[], []]
    content = json.loads(output.read_text())
    assert [facts["rank"] for facts in content["ranks"]] == [0, 1]
    (timing,) = content["all_reduce"]
    assert timing["backend"] == "gloo"
    assert timing["error"] == ""
    sizes = [sent for sent, _ in timing["points"]]
    assert sizes == sorted(sizes)
    assert sizes[0] < 2000 < sizes[-1]
    # One host has no links.
    assert content["pairs"] == []


def examine_all_but_the_last() -> str:
    world = World.from_environment()
    if world.rank == world.size - 1:
        return "absent"
    try:
        doctor.run(settings(wait=1.5), [])
    except Failed:
        return "failed"
    return "no problem"


def test_missing_rank_fails_the_others() -> None:
    assert run_ranks_to_the_end(examine_all_but_the_last, 3) == ["failed", "failed", "absent"]


def test_unreachable_or_unknown_rendezvous_is_reported(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(Failed):
        doctor.run(settings(address=f"127.0.0.1:{port}", ranks=2, rank=1, wait=0.3), [])
    printed = capfd.readouterr().out
    assert f"can't reach port {port} of 127.0.0.1, where ranks meet, within 0.3 s: refused" in printed
    assert f"open TCP port {port}" in printed
    with pytest.raises(Failed):
        doctor.run(settings(address="no-such-host.invalid:1234", ranks=2, rank=1, wait=0.3), [])
    printed = capfd.readouterr().out
    assert "the name 'no-such-host.invalid', where ranks meet, doesn't resolve" in printed


def test_port_in_use_is_reported(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(Failed):
        doctor.run(settings(address=f"127.0.0.1:{server.getsockname()[1]}", ranks=2, rank=0, wait=1), [])
    assert "can't serve port" in capfd.readouterr().out


def test_export_prints_shell_lines(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(interfaces, "addresses", lambda: {"lo": "127.0.0.1", "eth7": "10.0.0.2"})
    monkeypatch.setattr(interfaces, "source_address", lambda *_: "10.0.0.2")
    assert doctor.run(settings(export=True, address="10.0.0.1:29400"), []) == []
    assert capfd.readouterr().out == "export GLOO_SOCKET_IFNAME=eth7\nexport NCCL_SOCKET_IFNAME=eth7\n"


def test_command_runs_with_the_interface_in_its_environment() -> None:
    own = interfaces.source_address()
    interface = next((name for name, address in interfaces.addresses().items() if address == own), None)
    if interface is None:
        pytest.skip("no interface leads out of this machine")
    done = subprocess.run(
        [sys.executable, str(LAUNCH / "doctor.py"), "--", "sh", "-c", "echo $GLOO_SOCKET_IFNAME; exit 3"],
        check=False,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.stdout == f"{interface}\n"
    assert done.returncode == 3


def test_invalid_settings_are_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^address: 2 ranks need HOST:PORT"):
        doctor.run(settings(ranks=2, rank=0), [])
    with pytest.raises(ConfigError, match=r"^address=host: must be HOST:PORT"):
        doctor.run(settings(ranks=2, rank=0, address="host"), [])
    with pytest.raises(ConfigError, match=r"^rank=2: there are 2 ranks"):
        doctor.run(settings(ranks=2, rank=2, address="host:1"), [])
    with pytest.raises(ConfigError, match=r"^expect=fast: must be a rate"):
        doctor.run(settings(expect="fast"), [])
