"""Hosts of a test network hear each other until a link is cut, and again when it is mended."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from distrain.chaos.network import Network

ANSWER = """
import socket
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("", 7000))
while True:
    server.sendto(*server.recvfrom(10))
"""
ASK = """
import socket, sys
client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
client.settimeout(0.2)
for _ in range(int(sys.argv[2])):
    client.sendto(b"", (sys.argv[1], 7000))
    try:
        client.recvfrom(10)
        sys.exit(0)
    except OSError:
        pass
sys.exit(1)
"""


def test_a_link_is_cut_delayed_and_mended(tmp_path: Path) -> None:
    try:
        network = Network(2).__enter__()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {error}")
    server = network.start(1, [sys.executable, "-c", ANSWER], {}, tmp_path / "server")

    def hears(attempts: int) -> bool:
        ask = [sys.executable, "-c", ASK, network.address(1), str(attempts)]
        return network.start(0, ask, {}, tmp_path / "client").wait(timeout=60) == 0

    try:
        assert hears(50)
        network.cut(1)
        assert not hears(3)
        network.mend()
        assert hears(50)
        network.delay(0.01)
        assert hears(50)
        network.mend()
        # It can be delayed again only if nothing of the last delay is left.
        network.delay(0.01)
    finally:
        server.kill()
        server.wait()
        network.__exit__(None, None, None)
