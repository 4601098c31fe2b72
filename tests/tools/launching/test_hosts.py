"""All hosts end when one of them does."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from distrain.tools.launching import hosts
from distrain.tools.launching.hosts import Agent
from tests.runs import CONF
from tests.tools.launching.helpers import SSH, program, until


def agents(tmp_path: Path, *programs: str) -> list[Agent]:
    """Hosts named a, b, … that run these programs as long as they are held."""
    ssh = program(tmp_path / "ssh.py", SSH)
    found = []
    for name, text in zip("abc", programs, strict=False):
        command = program(tmp_path / f"{name}.py", text)
        line = shlex.join([sys.executable, "-m", "distrain.tools.launching.agent", "5", *command])
        found.append(Agent(name, (*ssh, name, line)))
    return found


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(CONF.parent))


def test_output_says_which_host_it_is_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hosts.run(agents(tmp_path, "print('one')", "print('two')"), 5) == 0
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


def test_one_that_fails_ends_the_others_with_time_to_save(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    up = tmp_path / "up"
    waits = f"import os, sys, time\nwhile not os.path.exists({str(up)!r}): time.sleep(0.02)\nsys.exit(3)"
    assert hosts.run(agents(tmp_path, waits, SAVES.replace("FILE", repr(str(up)))), 5) == 3
    said = capsys.readouterr().out.splitlines()
    assert "hosts: a failed with exit code 3; the others are ended" in said
    assert "[b] saved" in said


def test_being_asked_to_end_asks_all_hosts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ups = [tmp_path / "up_a", tmp_path / "up_b"]

    def interrupt() -> None:
        until(lambda: all(up.exists() for up in ups))
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    assert hosts.run(agents(tmp_path, *(SAVES.replace("FILE", repr(str(up))) for up in ups)), 5) == 128 + signal.SIGINT
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "hosts: SIGINT; 2 hosts are asked to end"
    assert sorted(said[1:]) == ["[a] saved", "[b] saved"]


def test_a_host_that_can_not_be_reached_fails(capsys: pytest.CaptureFixture[str]) -> None:
    unreachable = Agent("a", (sys.executable, "-c", "import sys; sys.exit('no route to host')"))
    assert hosts.run([unreachable], 1) == 1
    assert "[a] no route to host" in capsys.readouterr().out


def test_hosts_own_agent_outlives_no_dead_launcher(tmp_path: Path) -> None:
    """The launcher is killed, and can tell nobody."""
    up, saved = tmp_path / "up", tmp_path / "saved"
    text = SAVES.replace("FILE", repr(str(up))).replace("print(", f"pathlib.Path({str(saved)!r}).touch(); print(")
    there = agents(tmp_path, text)[0]
    launcher = f"from distrain.tools.launching import hosts; hosts.run([hosts.Agent('a', {there.command!r})], 5)"
    process = subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.DEVNULL)
    until(up.exists)
    process.kill()
    process.wait()
    until(saved.exists)
