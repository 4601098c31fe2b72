"""Hosts of test networks, which the tests of a file share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from distrain.tools.testnet.network import VirtualNetwork


@pytest.fixture(scope="module")
def two_hosts() -> Iterator[VirtualNetwork]:
    with VirtualNetwork(2) as net:
        yield net


@pytest.fixture(scope="module")
def four_hosts() -> Iterator[VirtualNetwork]:
    with VirtualNetwork(4) as net:
        yield net
