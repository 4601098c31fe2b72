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
    net: VirtualNetwork, function: Callable[..., Any], *args: Any, timeout: float = HANG_SECONDS
) -> list[Any]:
    """Like :func:`tests.harness.run_ranks`, with one rank per host."""
    holders = [net.namespace_pid(host) for host in range(net.hosts)]
    return run_ranks(on_host, net.hosts, holders, function, args, timeout=timeout)


def on_host(holders: Sequence[int], function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Moves a rank of the harness to the host of its number, then calls the function."""
    host = int(os.environ["RANK"])
    enter.enter_namespaces(holders[host])
    os.environ.update(network.rendezvous_variables(host, len(holders)))
    # There is no launcher, so rank 0 serves the store on its host.
    os.environ.update({"TORCHELASTIC_USE_AGENT_STORE": "False", "GLOO_SOCKET_IFNAME": "eth0"})
    return function(*args)
