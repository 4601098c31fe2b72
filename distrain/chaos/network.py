"""Several hosts on one Linux machine: a network namespace each, joined by a bridge, with links of a chosen rate.

Needs root, iproute2 and util-linux. Each host has its own interface ``eth0``, so that what it sends can be read from
the interface's own counter, and shares the machine's cores and file system.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

# Smaller token buckets are erratic at 1 Gbit/s.
_BURST = "256kb"
# Ethernet, IPv4, and TCP with time stamps.
_HEADERS = 14 + 20 + 32


class Network:
    """``with Network(2) as network:`` makes hosts 0 and 1, and removes them in the end.

    Args:
        hosts: How many.

    Raises:
        PermissionError: Not run by root.
        subprocess.CalledProcessError: A command of iproute2 fails.
    """

    def __init__(self, hosts: int) -> None:
        if os.geteuid():
            raise PermissionError("network namespaces need root")
        self.hosts = hosts
        self._tag = f"distrain{os.getpid()}"
        self._names = tempfile.TemporaryDirectory()

    def __enter__(self) -> Network:
        switch = self._switch
        lines = ["127.0.0.1 localhost"]
        try:
            _ip("netns", "add", switch)
            _ip("-n", switch, "link", "add", "br0", "type", "bridge")
            _ip("-n", switch, "link", "set", "br0", "up")
            for host in range(self.hosts):
                space = self._space(host)
                _ip("netns", "add", space)
                pair = ["link", "add", "eth0", "netns", space, "type", "veth", "peer", f"v{host}", "netns", switch]
                _ip(*pair)
                _ip("-n", space, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
                for name in ("eth0", "lo"):
                    _ip("-n", space, "link", "set", name, "up")
                _ip("-n", switch, "link", "set", f"v{host}", "master", "br0")
                _ip("-n", switch, "link", "set", f"v{host}", "up")
                lines.append(f"{self.address(host)} host{host}")
            self._hosts_file.write_text("\n".join(lines) + "\n")
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._remove()

    def _remove(self) -> None:
        there = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout.split()
        for name in there:
            if name.startswith(self._tag):
                _ip("netns", "del", name)
        self._names.cleanup()

    @property
    def _hosts_file(self) -> Path:
        return Path(self._names.name, "hosts")

    @property
    def _switch(self) -> str:
        return f"{self._tag}sw"

    def _space(self, host: int) -> str:
        return f"{self._tag}h{host}"

    def address(self, host: int) -> str:
        """A host's IPv4 address."""
        return f"10.78.0.{host + 1}"

    def limit(self, rate: str | None) -> None:
        """Sets what each host may send, like ``100mbit``; ``None`` for no limit."""
        for host in range(self.hosts):
            on = ["netns", "exec", self._space(host), "tc", "qdisc"]
            subprocess.run(["ip", *on, "del", "dev", "eth0", "root"], check=False, capture_output=True)
            if rate is not None:
                bucket = ["tbf", "rate", rate, "burst", _BURST, "latency", "50ms"]
                _ip(*on, "add", "dev", "eth0", "root", *bucket)

    def cut(self, host: int) -> None:
        """Takes a host's cable out; nothing arrives there or leaves it, and nobody is told."""
        _ip("-n", self._switch, "link", "set", f"v{host}", "down")

    def delay(self, seconds: float) -> None:
        """Lets everything that hosts send arrive so much later, or crawl where this kernel can't do that."""
        for host in range(self.hosts):
            on = ["ip", "netns", "exec", self._space(host), "tc", "qdisc", "add", "dev", "eth0", "root"]
            late = ["netem", "delay", f"{seconds * 1000:.0f}ms"]
            if subprocess.run([*on, *late], check=False, capture_output=True).returncode:
                # The queue holds as much as arrives meanwhile, and no more is let out than a modem would.
                crawling = ["tbf", "rate", "256kbit", "burst", "4kb", "latency", f"{seconds * 1000:.0f}ms"]
                subprocess.run([*on, *crawling], check=True)

    def mend(self) -> None:
        """Links are whole again, and as fast as they can be."""
        for host in range(self.hosts):
            _ip("-n", self._switch, "link", "set", f"v{host}", "up")
        self.limit(None)

    def start(
        self, host: int, command: Sequence[str], variables: Mapping[str, str], log: Path
    ) -> subprocess.Popen[bytes]:
        """Starts a command on a host; what it prints is added to ``log``."""
        # `ip netns exec` would mount another /sys, without which some programs don't run.
        enter = ["nsenter", f"--net=/run/netns/{self._space(host)}", "unshare", "--uts", "--mount"]
        shell = f'hostname host{host}; mount --bind {self._hosts_file} /etc/hosts; exec "$@"'
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", **variables}
        with log.open("ab") as file:
            return subprocess.Popen(
                [*enter, "sh", "-c", shell, "_", *command], env=environment, stdout=file, stderr=subprocess.STDOUT
            )


def payload_sent() -> int:
    """Bytes that this host's interface has sent, less the headers of its packets; called on the host."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, figures = line.partition(":")
        if name.strip() == "eth0":
            total, packets = (int(figures.split()[column]) for column in (8, 9))
            return total - _HEADERS * packets
    raise FileNotFoundError("this host has no eth0")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
