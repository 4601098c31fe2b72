"""Which interface gloo would use, and which leads to the others."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest

from distrain.tools.doctor import interfaces

HERE = {"lo": "127.0.0.1", "eth0": "10.0.0.2", "docker0": "172.17.0.1"}


@pytest.fixture(autouse=True)
def three_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interfaces, "addresses", lambda: HERE)
    monkeypatch.setattr("socket.gethostname", lambda: "node1")


def leads(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    """The host's own name leads there."""

    def look_up(*_: Any, **__: Any) -> Any:
        if address is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]

    monkeypatch.setattr("socket.getaddrinfo", look_up)


def test_named_interface_comes_first() -> None:
    choice = interfaces.gloo_choice({"GLOO_SOCKET_IFNAME": "docker0,eth0"})
    assert (choice.interface, choice.address) == ("docker0", "172.17.0.1")
    gone = interfaces.gloo_choice({"GLOO_SOCKET_IFNAME": "ib0"})
    assert gone.address == ""
    assert gone.why == "GLOO_SOCKET_IFNAME=ib0 names no interface with an address here"


def test_else_what_the_own_name_leads_to(monkeypatch: pytest.MonkeyPatch) -> None:
    leads(monkeypatch, "10.0.0.2")
    assert interfaces.gloo_choice({}).interface == "eth0"
    # As Debian writes it into /etc/hosts.
    leads(monkeypatch, "127.0.1.1")
    choice = interfaces.gloo_choice({})
    assert (choice.interface, choice.address) == ("lo", "127.0.1.1")
    assert choice.why == "its own name 'node1' leads to 127.0.1.1"


def test_else_the_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    leads(monkeypatch, None)
    choice = interfaces.gloo_choice({})
    assert (choice.interface, choice.address) == ("lo", "127.0.0.1")
    assert "'node1' doesn't resolve (Name or service not known)" in choice.why
    leads(monkeypatch, "10.9.9.9")
    choice = interfaces.gloo_choice({})
    assert choice.address == "127.0.0.1"
    assert "10.9.9.9, which is no address of this host" in choice.why


@pytest.mark.parametrize(
    ("named", "taken"),
    [
        ("", ["eth0"]),
        ("eth", ["eth0"]),
        ("=eth", []),
        ("docker,lo", ["lo", "docker0"]),
        ("^docker", ["lo", "eth0"]),
        ("^=docker", ["lo", "eth0", "docker0"]),
    ],
)
def test_nccl_takes_prefixes_whole_names_and_exclusions(named: str, taken: list[str]) -> None:
    assert interfaces.nccl_choices(HERE, named) == taken


def test_name_server_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def hang(*_: Any, **__: Any) -> Any:
        release.wait(30)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr("socket.getaddrinfo", hang)
    assert interfaces.resolve("node9", patience=0.05).error == "no answer within 0.05 s"
    release.set()


def test_way_to_the_loopback_starts_there() -> None:
    assert interfaces.towards("127.0.0.1") == "127.0.0.1"
    assert interfaces.towards("no such name") == ""
