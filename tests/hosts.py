"""Ranks on the hosts of a test network, for tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from distrain.tools.testnet import enter, network
from distrain.tools.testnet.network import Network
from tests.harness import run_ranks

#: Why there can be no test network here; none where there can.
LACKING = network.lacking()
needs_network = pytest.mark.skipif(LACKING is not None, reason=LACKING or "")


def run_on_hosts(net: Network, function: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
    """As :func:`tests.harness.run_ranks`, with one rank on each host."""
    holders = [net.holder(host) for host in range(net.hosts)]
    return run_ranks(on_host, net.hosts, holders, function, args, timeout=timeout)


def on_host(holders: Sequence[int], function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """What a rank of the harness does to be one of a host; the host is the rank's."""
    host = int(os.environ["RANK"])
    enter.enter(holders[host])
    os.environ.update(network.rendezvous(host, len(holders)))
    # No launcher serves the store: rank 0 does, on its host.
    os.environ.update({"TORCHELASTIC_USE_AGENT_STORE": "False", "GLOO_SOCKET_IFNAME": "eth0"})
    return function(*args)
