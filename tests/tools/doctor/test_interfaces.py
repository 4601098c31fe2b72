"""Which interface gloo and NCCL would use, and which one leads to the other hosts."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest

from distrain.tools.doctor import interfaces
from tests.harness import HANG_SECONDS

HERE = {"lo": "127.0.0.1", "eth0": "10.0.0.2", "docker0": "172.17.0.1"}


@pytest.fixture(autouse=True)
def three_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interfaces, "addresses", lambda: HERE)
    monkeypatch.setattr("socket.gethostname", lambda: "node1")


def own_name_resolves_to(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    """Lets the host's own name resolve to an address, or to nothing."""

    def look_up(*_: Any, **__: Any) -> Any:
        if address is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]

    monkeypatch.setattr("socket.getaddrinfo", look_up)


def test_gloo_takes_the_interface_that_the_variable_names() -> None:
    choice = interfaces.gloo_choice({"GLOO_SOCKET_IFNAME": "docker0,eth0"})
    assert (choice.interface, choice.address) == ("docker0", "172.17.0.1")
    gone = interfaces.gloo_choice({"GLOO_SOCKET_IFNAME": "ib0"})
    assert gone.address == ""
    assert gone.why == "GLOO_SOCKET_IFNAME=ib0 names no interface of this host that has an address"


def test_gloo_takes_the_interface_that_the_own_name_resolves_to(monkeypatch: pytest.MonkeyPatch) -> None:
    own_name_resolves_to(monkeypatch, "10.0.0.2")
    assert interfaces.gloo_choice({}).interface == "eth0"
    # As Debian writes it into /etc/hosts.
    own_name_resolves_to(monkeypatch, "127.0.1.1")
    choice = interfaces.gloo_choice({})
    assert (choice.interface, choice.address) == ("lo", "127.0.1.1")
    assert choice.why == "its own name 'node1' resolves to 127.0.1.1"


def test_gloo_takes_the_loopback_if_the_own_name_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    own_name_resolves_to(monkeypatch, None)
    choice = interfaces.gloo_choice({})
    assert (choice.interface, choice.address) == ("lo", "127.0.0.1")
    assert "'node1' doesn't resolve (Name or service not known)" in choice.why
    own_name_resolves_to(monkeypatch, "10.9.9.9")
    choice = interfaces.gloo_choice({})
    assert choice.address == "127.0.0.1"
    assert "10.9.9.9, which is no address of this host" in choice.why


@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        ("", ["eth0"]),
        ("eth", ["eth0"]),
        ("=eth", []),
        ("docker,lo", ["lo", "docker0"]),
        ("^docker", ["lo", "eth0"]),
        ("^=docker", ["lo", "eth0", "docker0"]),
    ],
)
def test_nccl_takes_prefixes_whole_names_and_exclusions(requested: str, expected: list[str]) -> None:
    assert interfaces.nccl_choices(HERE, requested) == expected


def test_name_server_that_does_not_answer_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def hang(*_: Any, **__: Any) -> Any:
        release.wait(HANG_SECONDS)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr("socket.getaddrinfo", hang)
    assert interfaces.resolve("node9", timeout=0.05).error == "no answer within 0.05 s"
    release.set()


def test_source_address_of_the_loopback_is_the_loopback() -> None:
    assert interfaces.source_address("127.0.0.1") == "127.0.0.1"
    assert interfaces.source_address("no such name") == ""
