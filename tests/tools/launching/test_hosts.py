"""What is started on each host, and that all end when one does."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from distrain.errors import ConfigError
from distrain.tools.launching import hosts
from distrain.tools.launching.hosts import Agent, HostsSettings
from tests.runs import CONF
from tests.tools.launching.helpers import SSH, program, until


def settings(**changes: Any) -> HostsSettings:
    values: dict[str, Any] = {
        "hosts": ["a", "me@b"],
        "addresses": None,
        "nproc": "2",
        "ssh": "ssh -p 22",
        "python": "/venv/python",
        "folder": "/a folder",
        "script": None,
        "env": {},
        "port": 29400,
        "torchrun": [],
        "grace_seconds": 45.0,
    }
    return HostsSettings(**{**values, **changes})


def remote(agent: Agent) -> list[str]:
    """What the shell of the host is told, as words."""
    return shlex.split(agent.command[-1])


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_each_host_gets_an_agent_that_meets_the_others_on_the_first() -> None:
    first, second = hosts.plan(settings(), Path("/d/train.py"), ["strategy=ddp", "data.root=/my data"])
    assert first.command[:4] == ("ssh", "-p", "22", "a")
    assert second.command[:4] == ("ssh", "-p", "22", "me@b")
    for agent, is_host, address in ((first, 1, "a"), (second, 0, "b")):
        words = remote(agent)
        assert words[:4] == ["cd", "/a folder", "&&", "exec"]
        assert words[-3:] == ["/d/train.py", "strategy=ddp", "data.root=/my data"]
        assert option(words, "--nnodes") == "2"
        assert option(words, "--nproc-per-node") == "2"
        assert option(words, "--rdzv-endpoint") == "a:29400"
        assert option(words, "--rdzv-conf") == f"is_host={is_host}"
        assert option(words, "--local-addr") == address
    assert option(remote(first), "--rdzv-id") == option(remote(second), "--rdzv-id")


def test_two_trainings_meet_apart() -> None:
    meetings = {
        (option(words, "--rdzv-id"), option(words, "--rdzv-endpoint"))
        for words in (remote(hosts.plan(settings(port=None), Path("t.py"), [])[0]) for _ in range(5))
    }
    assert len({meeting for meeting, _ in meetings}) == 5
    assert all(20000 <= int(endpoint.partition(":")[2]) <= 29999 for _, endpoint in meetings)


def test_addresses_variables_options_and_script_are_the_users() -> None:
    chosen = settings(
        addresses=["10.0.0.1", "10.0.0.2"],
        env={"GLOO_SOCKET_IFNAME": "eth1"},
        torchrun=["--max-restarts", "3"],
        script="launch/evaluate.py",
    )
    words = remote(hosts.plan(chosen, Path("t.py"), ["run=r"])[1])
    assert option(words, "--rdzv-endpoint") == "10.0.0.1:29400"
    assert option(words, "--local-addr") == "10.0.0.2"
    assert option(words, "env") == "GLOO_SOCKET_IFNAME=eth1"
    assert words[-4:] == ["--max-restarts", "3", "launch/evaluate.py", "run=r"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hosts": []}, "hosts=[]: name at least one host"),
        ({"hosts": ["a", "-oProxyCommand=evil"]}, "hosts=-oProxyCommand=evil: is not the name of a host"),
        ({"addresses": ["10.0.0.1"]}, "addresses=['10.0.0.1']: needs one for each of the 2 hosts"),
        ({"ssh": ""}, "ssh=: is not a command"),
    ],
)
def test_mistakes_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        hosts.plan(settings(**changes), Path("t.py"), [])
    assert str(refused.value) == said


def test_a_trainings_mistake_is_refused_before_any_host_starts() -> None:
    hosts.check(CONF, ["strategy=ddp", "optimizer.lr=0.1"])
    with pytest.raises(ConfigError, match=r"^optimizer.lrr: no such key"):
        hosts.check(CONF, ["optimizer.lrr=0.1"])
    with pytest.raises(ConfigError, match=r"^optimizer.lr=-1"):
        hosts.check(CONF, ["optimizer.lr=-1"])


def test_arguments_part_at_the_dashes() -> None:
    assert hosts.parted(["hosts=[a]", "--", "x=1", "--", "y"]) == (["hosts=[a]"], ["x=1", "--", "y"])
    assert hosts.parted(["--help"]) == (["--help"], [])


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
