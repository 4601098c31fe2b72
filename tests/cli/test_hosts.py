"""The command that is started on each host, and what a command line may not say."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from distrain.cli import hosts
from distrain.cli.hosts import HostsSettings
from distrain.errors import ConfigError
from distrain.tools.launching.hosts import Agent
from tests.runs import CONF


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
