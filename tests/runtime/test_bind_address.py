"""A job's own sockets listen on no more addresses than its ranks need."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from distrain.config.schema import Config
from distrain.runtime import bind_address
from distrain.runtime.bind_address import is_single_host, open_store, restrict_gloo_to_loopback
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from tests.harness import HANG_SECONDS, run_ranks
from tests.runs import small

SECONDS = datetime.timedelta(seconds=HANG_SECONDS)
ONE_HOST = World(0, 2, 0, 2, "here")
TWO_HOSTS = World(0, 2, 0, 1, "here")
_LISTENING = "0A"


@pytest.fixture(autouse=True)
def launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def listening_addresses() -> list[str]:
    """Addresses, in hexadecimal digits, on which this process listens for TCP connections."""
    inodes = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        # The descriptor of the listing itself is closed by now.
        with contextlib.suppress(FileNotFoundError):
            inodes.add(str(descriptor.readlink()))
    addresses = []
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTENING and f"socket:[{fields[9]}]" in inodes:
                addresses.append(fields[1].partition(":")[0])
    return addresses


def is_loopback(address: str) -> bool:
    # The bytes of each 32-bit word are in the machine's order.
    words = [int(address[start : start + 8], 16) for start in range(0, len(address), 8)]
    raw = b"".join(word.to_bytes(4, sys.byteorder) for word in words)
    return ipaddress.ip_address(raw).is_loopback


def listen_on_rank(configuration: Config, port: int) -> tuple[int, list[str]]:
    """Returns the addresses on which a rank listens while the job runs; rank 0 serves the store."""
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(port)}
    world = World.from_environment()
    with Runtime(configuration, world) as runtime:
        group = dist.new_group(list(range(world.size)))
        dist.barrier(group)
        runtime.communicator().barrier()
        addresses = listening_addresses()
        runtime.communicator().barrier()
    return world.rank, addresses


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's tables of sockets")
def test_ranks_of_one_host_listen_on_loopback_only(tmp_path: Path) -> None:
    configuration = small("strategy=ddp", f"run_dir={tmp_path}")
    for rank, addresses in run_ranks(listen_on_rank, 2, configuration, free_port()):
        # One for the store, and one for each group.
        assert len(addresses) >= (3 if rank == 0 else 2)
        assert [address for address in addresses if not is_loopback(address)] == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's tables of sockets")
@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("world", [ONE_HOST, TWO_HOSTS], ids=["one host", "several hosts"])
def test_a_store_at_a_loopback_address_listens_only_there(name: str, world: World) -> None:
    port, before = free_port(), listening_addresses()
    store = open_store(name, port, world, serves=True, timeout=SECONDS)
    new = listening_addresses()
    for address in before:
        new.remove(address)
    assert len(new) == 1
    assert is_loopback(new[0])
    client = open_store(name, port, world, serves=False, timeout=SECONDS)
    client.set("key", "value")
    assert store.get("key") == b"value"


def bound_to(monkeypatch: pytest.MonkeyPatch, world: World, *addresses: str) -> str | None:
    """Returns where the store would listen if its host's name resolved to these addresses."""

    def lookup(host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        families = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in addresses]
        return [
            (family, socket.SOCK_STREAM, 6, "", (address, port))
            for family, address in zip(families, addresses, strict=True)
        ]

    port = free_port()
    with monkeypatch.context() as patch:
        # create_server is given IP addresses and looks nothing up.
        patch.setattr(socket, "getaddrinfo", lookup)
        listener = bind_address._listen("head-node", port, world)
    if listener is None:
        return None
    with listener:
        return str(listener.getsockname()[0])


def test_a_name_that_is_loopback_only_on_its_own_host_is_not_used_for_several_hosts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Debian's /etc/hosts maps the host's own name to this address.
    assert bound_to(monkeypatch, TWO_HOSTS, "127.0.1.1") is None
    assert bound_to(monkeypatch, ONE_HOST, "127.0.1.1") == "127.0.1.1"
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert bound_to(monkeypatch, ONE_HOST, "127.0.1.1") is None


def test_an_address_of_another_host_is_left_to_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    # The address of a service or a router that forwards to this host.
    assert bound_to(monkeypatch, TWO_HOSTS, "192.0.2.1") is None
    assert bound_to(monkeypatch, TWO_HOSTS, "192.0.2.1", "127.0.0.1") is None


def test_a_port_that_is_taken_is_reported_by_the_store() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(RuntimeError, match=r"address already in use|EADDRINUSE"),
    ):
        open_store("127.0.0.1", taken.getsockname()[1], ONE_HOST, serves=True, timeout=SECONDS)


def test_gloo_uses_loopback_on_one_host_and_keeps_the_users_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    restrict_gloo_to_loopback(TWO_HOSTS)
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    restrict_gloo_to_loopback(ONE_HOST)
    assert os.environ["GLOO_SOCKET_IFNAME"] in ("lo", "lo0")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    restrict_gloo_to_loopback(ONE_HOST)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"


def test_if_the_launcher_does_not_say_ranks_may_run_on_several_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_single_host(ONE_HOST)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert not is_single_host(ONE_HOST)
