"""A job's own ports are open no wider than its ranks need."""

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
from tests.harness import run_ranks
from tests.runs import small

SECONDS = datetime.timedelta(seconds=10)
ALL_HERE = World(0, 2, 0, 2, "here")
ELSEWHERE_TOO = World(0, 2, 0, 1, "here")
_LISTENS = "0A"


@pytest.fixture(autouse=True)
def launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def listening_at() -> list[str]:
    """Addresses, as hexadecimal digits, at which this process listens by TCP."""
    inodes = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        # The listing's own is gone.
        with contextlib.suppress(FileNotFoundError):
            inodes.add(str(descriptor.readlink()))
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTENS and f"socket:[{fields[9]}]" in inodes:
                found.append(fields[1].partition(":")[0])
    return found


def is_loopback(address: str) -> bool:
    # Of each 32-bit word the bytes stand in the machine's order.
    words = [int(address[start : start + 8], 16) for start in range(0, len(address), 8)]
    raw = b"".join(word.to_bytes(4, sys.byteorder) for word in words)
    return ipaddress.ip_address(raw).is_loopback


def listen_on_rank(configuration: Config, port: int) -> tuple[int, list[str]]:
    """What a rank's process listens at while the job runs, when the first rank serves the store."""
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(port)}
    world = World.from_environment()
    with Runtime(configuration, world) as runtime:
        group = dist.new_group(list(range(world.size)))
        dist.barrier(group)
        runtime.communicator().barrier()
        found = listening_at()
        runtime.communicator().barrier()
    return world.rank, found


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's tables of sockets")
def test_ranks_of_one_host_listen_on_loopback_alone(tmp_path: Path) -> None:
    configuration = small("strategy=ddp", f"run_dir={tmp_path}")
    for rank, found in run_ranks(listen_on_rank, 2, configuration, free_port()):
        # The store, and a port for each group.
        assert len(found) >= (3 if rank == 0 else 2)
        assert [address for address in found if not is_loopback(address)] == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's tables of sockets")
@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("world", [ALL_HERE, ELSEWHERE_TOO], ids=["one host", "several hosts"])
def test_a_store_at_loopback_listens_there_and_can_be_reached(name: str, world: World) -> None:
    port, before = free_port(), listening_at()
    store = open_store(name, port, world, serves=True, timeout=SECONDS)
    new = listening_at()
    for address in before:
        new.remove(address)
    assert len(new) == 1
    assert is_loopback(new[0])
    guest = open_store(name, port, world, serves=False, timeout=SECONDS)
    guest.set("key", "value")
    assert store.get("key") == b"value"


def bound_to(monkeypatch: pytest.MonkeyPatch, world: World, *addresses: str) -> str | None:
    """Where the store would listen if its host's name led to these addresses."""

    def lookup(host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        families = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in addresses]
        return [
            (family, socket.SOCK_STREAM, 6, "", (address, port))
            for family, address in zip(families, addresses, strict=True)
        ]

    port = free_port()
    with monkeypatch.context() as patch:
        # create_server takes numbers, and looks nothing up.
        patch.setattr(socket, "getaddrinfo", lookup)
        found = bind_address._bound("head-node", port, world)
    if found is None:
        return None
    with found:
        return str(found.getsockname()[0])


def test_a_name_that_leads_only_its_own_host_to_loopback_is_no_place_to_wait_for_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As Debian's /etc/hosts has it.
    assert bound_to(monkeypatch, ELSEWHERE_TOO, "127.0.1.1") is None
    assert bound_to(monkeypatch, ALL_HERE, "127.0.1.1") == "127.0.1.1"
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert bound_to(monkeypatch, ALL_HERE, "127.0.1.1") is None


def test_an_address_that_is_not_this_hosts_is_left_to_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    # That of a service or of a router that leads here.
    assert bound_to(monkeypatch, ELSEWHERE_TOO, "192.0.2.1") is None
    assert bound_to(monkeypatch, ELSEWHERE_TOO, "192.0.2.1", "127.0.0.1") is None


def test_a_port_that_is_taken_is_said_by_the_store() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(dist.DistError, match=r"address already in use|EADDRINUSE"),
    ):
        open_store("127.0.0.1", taken.getsockname()[1], ALL_HERE, serves=True, timeout=SECONDS)


def test_gloo_stays_on_one_host_and_goes_where_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    restrict_gloo_to_loopback(ELSEWHERE_TOO)
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    restrict_gloo_to_loopback(ALL_HERE)
    assert os.environ["GLOO_SOCKET_IFNAME"] in ("lo", "lo0")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    restrict_gloo_to_loopback(ALL_HERE)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"


def test_a_launcher_that_says_nothing_may_have_started_ranks_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_single_host(ALL_HERE)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert not is_single_host(ALL_HERE)
