"""Ranks share memory where they can; if one rank can't, no rank of the group does."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from distrain.communication.shared_memory import connect
from distrain.communication.shared_memory.connect import channel_registry
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from tests.communication.shared_memory.ranks import form_group, shares_memory
from tests.harness import run_ranks
from tests.runs import small


def no_such_call(*_: object) -> int:
    raise OSError("there is no memfd_create")


def no_memory(*_: object) -> None:
    raise OSError("no memory is left")


def other_network() -> list[str]:
    return ["boot", f"net:[{os.environ['RANK']}]", "pid:[1]", "host"]


def may_not_open(*_: object) -> None:
    raise PermissionError("not allowed")


def make_fail(how: str) -> None:
    """Makes something fail that sharing memory needs, on one rank only where possible."""
    last = os.environ["RANK"] == "1"
    if how == "old" and last:
        del os.memfd_create
    elif how == "addresses" and last:
        connect._address_space_is_limited = lambda: True
    elif how == "memfd" and last:
        os.memfd_create = no_such_call  # type: ignore[assignment]
    elif how == "memory" and last:
        os.posix_fallocate = no_memory
    elif how == "mapping" and last:
        connect.MappedArena = may_not_open  # type: ignore[attr-defined, assignment]
    elif how == "network":
        connect.host_identity = other_network
    elif how == "name":
        socket.gethostname = lambda: f"host{os.environ['RANK']}"
    elif how == "processor":
        connect.platform.machine = lambda: "aarch64"  # type: ignore[attr-defined]
    elif how == "off":
        channel_registry.enabled = False


def connect_ranks(how: str) -> tuple[bool, list[str], float]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("distrain").addHandler(handler)
    make_fail(how)
    everyone = form_group()
    shared = shares_memory(everyone)
    # Another group with the same problem logs nothing.
    again = type(everyone)(dist.new_group())
    assert shares_memory(again) == shared
    return shared, messages, float(everyone.all_reduce(torch.ones(())))


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("memfd", "there is no memfd_create"),
        ("old", "has no attribute 'memfd_create'"),
        ("addresses", "the address space of a process is limited here (ulimit -v), and arenas need much of it"),
        ("memory", "no memory is left"),
        ("mapping", "not allowed"),
        ("processor", "not on linux aarch64"),
    ],
)
def test_no_rank_shares_memory_if_one_cannot_and_the_reason_is_logged_once(how: str, why: str) -> None:
    for shared, messages, total in run_ranks(connect_ranks, 2, how):
        assert not shared
        (line,) = messages
        assert line.startswith("ranks of this host talk over the network, since they can't share memory: rank ")
        assert line.endswith(why)
        assert total == 2


@pytest.mark.parametrize("how", ["network", "name", "off"])
def test_ranks_on_several_hosts_or_with_sharing_off_use_the_network(how: str) -> None:
    assert run_ranks(connect_ranks, 2, how) == [(False, [], 2.0)] * 2


def test_ranks_of_one_host_share_memory() -> None:
    assert run_ranks(connect_ranks, 3, "nothing") == [(True, [], 3.0)] * 3


def test_host_identity_holds_boot_namespaces_and_host_name() -> None:
    boot, network, processes, host = connect.host_identity()
    assert (len(boot), host) == (36, socket.gethostname())
    assert network.startswith("net:[")
    assert processes.startswith("pid:[")


def configured(folder: Path, value: str) -> tuple[bool, bool, int]:
    with Runtime(
        small("strategy=ddp", f"run_dir={folder}", f"runtime.shared_memory={value}"), World.from_environment()
    ) as runtime:
        everyone, aside = runtime.communicator(), runtime.control_group()
        shared = shares_memory(everyone), shares_memory(aside)
        assert everyone._channel is None or everyone._channel is not aside._channel
        # Another communicator of the same group uses the same channel.
        assert (runtime.communicator()._channel_for(None) is everyone._channel) == (everyone.rank >= 0)
    return *shared, len(channel_registry._channels)


@pytest.mark.parametrize(("value", "shared"), [("auto", True), ("off", False)])
def test_configuration_enables_sharing_and_channels_are_closed_with_the_run(
    value: str, shared: bool, tmp_path: Path
) -> None:
    assert run_ranks(configured, 2, tmp_path, value) == [(shared, shared, 0)] * 2
