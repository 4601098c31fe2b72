"""The command that is started on each host, and which settings are refused."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from distrain.cli import hosts
from distrain.cli.hosts import HostsSettings
from distrain.errors import ConfigError
from distrain.tools.launching.hosts import HostCommand
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


def remote_words(command: HostCommand) -> list[str]:
    """Returns the words of the command line that the host's shell gets."""
    return shlex.split(command.command[-1])


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_each_host_gets_an_agent_whose_rendezvous_is_on_the_first_host() -> None:
    first, second = hosts.host_commands(settings(), ["strategy=ddp", "data.root=/my data"])
    assert first.command[:4] == ("ssh", "-p", "22", "a")
    assert second.command[:4] == ("ssh", "-p", "22", "me@b")
    for command, is_host, address in ((first, 1, "a"), (second, 0, "b")):
        words = remote_words(command)
        assert words[:4] == ["cd", "/a folder", "&&", "exec"]
        assert words[-5:] == ["-m", "distrain", "train", "strategy=ddp", "data.root=/my data"]
        assert option(words, "--nnodes") == "2"
        assert option(words, "--nproc-per-node") == "2"
        assert option(words, "--rdzv-endpoint") == "a:29400"
        assert option(words, "--rdzv-conf") == f"is_host={is_host}"
        assert option(words, "--local-addr") == address
    assert option(remote_words(first), "--rdzv-id") == option(remote_words(second), "--rdzv-id")


def test_trainings_have_separate_rendezvous() -> None:
    rendezvous = {
        (option(words, "--rdzv-id"), option(words, "--rdzv-endpoint"))
        for words in (remote_words(hosts.host_commands(settings(port=None), [])[0]) for _ in range(5))
    }
    assert len({identifier for identifier, _ in rendezvous}) == 5
    assert all(20000 <= int(endpoint.partition(":")[2]) <= 29999 for _, endpoint in rendezvous)


def test_addresses_variables_options_and_script_are_passed_on() -> None:
    values = settings(
        addresses=["10.0.0.1", "10.0.0.2"],
        env={"GLOO_SOCKET_IFNAME": "eth1"},
        torchrun=["--max-restarts", "3"],
        script="launch/evaluate.py",
    )
    words = remote_words(hosts.host_commands(values, ["run=r"])[1])
    assert option(words, "--rdzv-endpoint") == "10.0.0.1:29400"
    assert option(words, "--local-addr") == "10.0.0.2"
    assert option(words, "env") == "GLOO_SOCKET_IFNAME=eth1"
    assert words[-4:] == ["--max-restarts", "3", "launch/evaluate.py", "run=r"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hosts": []}, "hosts=[]: name at least one host"),
        ({"hosts": ["a", "-oProxyCommand=evil"]}, "hosts=-oProxyCommand=evil: is not the name of a host"),
        ({"addresses": ["10.0.0.1"]}, "addresses=['10.0.0.1']: needs one for each of the 2 hosts"),
        ({"ssh": ""}, "ssh=: is not a command"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as refused:
        hosts.host_commands(settings(**changes), [])
    assert str(refused.value) == expected


def test_wrong_setting_of_the_training_is_refused_before_any_host_starts() -> None:
    hosts.check_training(CONF, ["strategy=ddp", "optimizer.lr=0.1"])
    with pytest.raises(ConfigError, match=r"^optimizer.lrr: no such key"):
        hosts.check_training(CONF, ["optimizer.lrr=0.1"])
    with pytest.raises(ConfigError, match=r"^optimizer.lr=-1"):
        hosts.check_training(CONF, ["optimizer.lr=-1"])
