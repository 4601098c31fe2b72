"""Runs test functions as ranks on the hosts of a test network."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from distrain.tools.testnet import enter, network
from distrain.tools.testnet.network import VirtualNetwork
from tests.harness import HANG_SECONDS, run_ranks

#: Why this machine can't make a test network; None if it can.
UNAVAILABLE_REASON = network.unavailable_reason()
needs_network = pytest.mark.skipif(UNAVAILABLE_REASON is not None, reason=UNAVAILABLE_REASON or "")


def run_on_hosts(
    net: VirtualNetwork, function: Callable[..., Any], *args: Any, per_host: int = 1, timeout: float = HANG_SECONDS
) -> list[Any]:
    """Like :func:`tests.harness.run_ranks`, with so many ranks on each host, which are neighbours."""
    holders = [net.namespace_pid(host) for host in range(net.hosts)]
    return run_ranks(on_host, net.hosts * per_host, holders, function, args, per_host, timeout=timeout)


def on_host(holders: Sequence[int], function: Callable[..., Any], args: tuple[Any, ...], per_host: int = 1) -> Any:
    """Moves a rank of the harness to its host, then calls the function."""
    rank = int(os.environ["RANK"])
    host, local_rank = divmod(rank, per_host)
    enter.enter_namespaces(holders[host])
    os.environ.update(network.rendezvous_variables(host, len(holders)))
    places = {
        "RANK": rank,
        "WORLD_SIZE": per_host * len(holders),
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": per_host,
    }
    os.environ.update({name: str(number) for name, number in places.items()})
    # There is no launcher, so rank 0 serves the store on its host.
    os.environ.update({"TORCHELASTIC_USE_AGENT_STORE": "False", "GLOO_SOCKET_IFNAME": "eth0"})
    return function(*args)
