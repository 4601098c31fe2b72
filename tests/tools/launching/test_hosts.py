"""Hosts run and end together, and their output names the host."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from distrain.tools.launching.hosts import HostCommand, run_on_hosts
from tests.runs import CONF
from tests.tools.launching.helpers import SSH, program, wait_until


def host_commands(tmp_path: Path, *programs: str) -> list[HostCommand]:
    """Returns commands for hosts named a, b, …, each of which runs one of the programs under an agent."""
    ssh = program(tmp_path / "ssh.py", SSH)
    commands = []
    for name, text in zip("abc", programs, strict=False):
        command = program(tmp_path / f"{name}.py", text)
        line = shlex.join([sys.executable, "-m", "distrain.tools.launching.agent", "60", *command])
        commands.append(HostCommand(name, (*ssh, name, line)))
    return commands


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(CONF.parent))


def test_each_output_line_names_its_host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_on_hosts(host_commands(tmp_path, "print('one')", "print('two')"), 60) == 0
    assert sorted(capsys.readouterr().out.splitlines()) == ["[a] one", "[b] two"]


SAVES = """
import pathlib, signal, sys, time
def save(*_):
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
pathlib.Path(FILE).touch()
time.sleep(600)
"""


def test_failed_host_ends_the_others_with_time_to_save(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    up = tmp_path / "up"
    waits = f"import os, sys, time\nwhile not os.path.exists({str(up)!r}): time.sleep(0.02)\nsys.exit(3)"
    assert run_on_hosts(host_commands(tmp_path, waits, SAVES.replace("FILE", repr(str(up)))), 60) == 3
    printed = capsys.readouterr().out.splitlines()
    assert "hosts: a failed with exit code 3; ending the others" in printed
    assert "[b] saved" in printed


def test_termination_signal_ends_all_hosts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ups = [tmp_path / "up_a", tmp_path / "up_b"]

    def interrupt() -> None:
        wait_until(lambda: all(up.exists() for up in ups))
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    assert (
        run_on_hosts(host_commands(tmp_path, *(SAVES.replace("FILE", repr(str(up))) for up in ups)), 60)
        == 128 + signal.SIGINT
    )
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "hosts: SIGINT; ending 2 hosts"
    assert sorted(printed[1:]) == ["[a] saved", "[b] saved"]


def test_unreachable_host_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    unreachable = HostCommand("a", (sys.executable, "-c", "import sys; sys.exit('no route to host')"))
    assert run_on_hosts([unreachable], 1) == 1
    assert "[a] no route to host" in capsys.readouterr().out


def test_training_ends_when_the_launcher_is_killed(tmp_path: Path) -> None:
    """A killed launcher cannot tell the hosts, but its connections close."""
    up, saved = tmp_path / "up", tmp_path / "saved"
    text = SAVES.replace("FILE", repr(str(up))).replace("print(", f"pathlib.Path({str(saved)!r}).touch(); print(")
    remote = host_commands(tmp_path, text)[0]
    launcher = (
        "from distrain.tools.launching.hosts import HostCommand, run_on_hosts; "
        f"run_on_hosts([HostCommand('a', {remote.command!r})], 60)"
    )
    process = subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.DEVNULL)
    wait_until(up.exists)
    process.kill()
    process.wait()
    wait_until(saved.exists)
