"""Virtual hosts and the links between them.

Each host is a set of Linux namespaces with its own processes, network interface ``eth0``, host name and ``/etc/hosts``.
All hosts share the machine's cores and file system. The namespaces have no names in the file system: one holder process
per host keeps them alive. It ends with the process that made the network, however that process ends; the kernel then
kills every process in the namespaces and removes the interfaces.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from distrain.tools.testnet import enter, relay

# With a smaller token bucket the rate is unstable at 1 Gbit/s.
_BURST = "256kb"
# Bytes of headers per packet: Ethernet, IPv4, and TCP with timestamps.
_HEADER_BYTES = 14 + 20 + 32
#: All last numbers have three digits, because torchrun's rendezvous sorts hosts by their addresses as text.
_FIRST_ADDRESS = 101
_MAX_HOSTS = 154
#: Argument by which holder processes are recognised among all processes of the machine.
_MARK = "distrain-testnet"
_SWITCH = "switch"
#: How long killed holders may take to end.
_END_SECONDS = 30.0
#: Script of process 1 of a host. It waits for the end of its input; ignoring SIGCHLD prevents zombies.
#: BBR, which some systems use for TCP, limits the bytes on their way by the shortest round trip. That of a virtual link
#: is a hundredth of a real one's, and senders then wait for acknowledgements that their peers delay by 40 ms.
_HOLDER_SCRIPT = """\
hostname "$2" && mount --bind "$3" /etc/hosts && ip link set lo up || exit 1
{ echo cubic >/proc/sys/net/ipv4/tcp_congestion_control; } 2>/dev/null
trap '' CHLD
echo ready
exec cat >/dev/null
"""
_TOOLS = ("ip", "tc", "unshare", "nsenter", "mount", "hostname")
#: Default rendezvous port.
_RENDEZVOUS_PORT = 29500


def unavailable_reason() -> str | None:
    """Says in one line why this machine can't make a test network; ``None`` if it can."""
    if sys.platform != "linux":
        return "a test network needs Linux"
    if os.geteuid():
        return "a test network needs root (or the root of a namespace: unshare --user --map-root-user COMMAND)"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"a test network needs {', '.join(missing)}, from the packages iproute2, util-linux, mount and hostname"
    trial = subprocess.run(
        ["unshare", "--net", "--uts", "--pid", "--fork", "--mount-proc", "true"],
        check=False,
        capture_output=True,
        text=True,
    )
    if trial.returncode:
        return f"a test network needs the right to make namespaces ({trial.stderr.strip()})"
    return None


class VirtualNetwork:
    """Virtual hosts on one switch, as a context manager.

    ``with VirtualNetwork(2) as network:`` makes hosts 0 and 1. On leaving, every process on them is killed and the
    hosts are removed.

    Args:
        hosts: Number of hosts, up to 154.
        delay: Seconds that each packet takes from one host to another.
        loss: Share of packets that are dropped, from 0 to 1.
        names: Whether hosts can resolve their own and each other's names.
        name: Name of the network on this machine; by default this process's number.

    Raises:
        ValueError: The number of hosts is out of range.
        RuntimeError: On entering: this machine can't make a test network; the message says why.
    """

    def __init__(
        self, hosts: int, *, delay: float = 0.0, loss: float = 0.0, names: bool = True, name: str | None = None
    ) -> None:
        if not 1 <= hosts <= _MAX_HOSTS:
            raise ValueError(f"a test network has 1 to {_MAX_HOSTS} hosts, not {hosts}")
        self.hosts = hosts
        self.name = name or str(os.getpid())
        self._delay, self._loss, self._names = delay, loss, names
        self._rates: list[str | None] = [None] * hosts
        self._holders: list[subprocess.Popen[str]] = []
        self._relay: subprocess.Popen[str] | None = None

    def __enter__(self) -> VirtualNetwork:
        reason = unavailable_reason()
        if reason is not None:
            raise RuntimeError(reason)
        try:
            self._make_hosts()
            self._connect_hosts()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._remove()

    def _make_hosts(self) -> None:
        # The bind mounts stay valid after the file is deleted.
        with tempfile.TemporaryDirectory() as folder:
            table = Path(folder, "hosts")
            entries = [f"{address(host)} {host_name(host)}" for host in range(self.hosts)] if self._names else []
            table.write_text("\n".join(["127.0.0.1 localhost", *entries]) + "\n")
            # Any user on a host may read it.
            Path(folder).chmod(0o755)
            for name in [*map(host_name, range(self.hosts)), _SWITCH]:
                self._holders.append(_start_holder(self.name, name, table))
            for holder in self._holders:
                assert holder.stdout is not None and holder.stderr is not None
                if not holder.stdout.readline():
                    raise RuntimeError(f"can't make a host: {holder.stderr.read().strip()}")

    def _connect_hosts(self) -> None:
        switch = self.namespace_pid(self.hosts)
        ports = [_port(host) for host in range(self.hosts)]
        relayed = self._delay > 0 or self._loss > 0
        # Run inside the switch's namespace, where the root of a user namespace has the right to do it.
        lines = [] if relayed else ["link add bridge type bridge", "link set bridge up"]
        for host, port in enumerate(ports):
            peer = f"name eth0 address {relay.hardware_address(host)} netns {self.namespace_pid(host)}"
            lines.append(f"link add {port} type veth peer {peer}")
            lines.append(f"link set {port} up" if relayed else f"link set {port} master bridge up")
        _inside(switch, "ip", "-batch", "-", lines=lines)
        for host in range(self.hosts):
            # Each packet is then one frame, so that packets are lost independently.
            single = ["link set eth0 gso_max_segs 1"] if self._loss > 0 else []
            lines = [f"addr add {address(host)}/24 dev eth0", *single, "link set eth0 up"]
            _inside(self.namespace_pid(host), "ip", "-batch", "-", lines=lines)
        if relayed:
            command = [*_python_command(relay.__file__), str(self._delay), str(self._loss), *ports]
            self._relay = subprocess.Popen(
                [*_enter_command(switch), *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
            )
            assert self._relay.stdout is not None
            if not self._relay.stdout.readline():
                raise RuntimeError("the relay that delays packets did not start; see its error above")

    def _remove(self) -> None:
        for holder in self._holders:
            # This also kills its child, process 1 of the host, and with it every process on the host.
            holder.kill()
        for process in [*self._holders, *([self._relay] if self._relay else [])]:
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        self._holders.clear()
        self._relay = None

    def namespace_pid(self, host: int) -> int:
        """Process number of the host's holder, for :func:`~distrain.tools.testnet.enter.enter_namespaces`."""
        return self._holders[host].pid

    def address(self, host: int) -> str:
        """IPv4 address of a host."""
        return address(host)

    def set_rate(self, rate: str | None, hosts: Iterable[int] | None = None) -> None:
        """Limits the rate at which each host sends; also ends :meth:`add_delay` for these hosts.

        Args:
            rate: A rate in ``tc``'s notation, like ``100mbit``; ``None`` for no limit.
            hosts: The hosts to limit; by default all.

        Raises:
            RuntimeError: ``tc`` refuses the rate.
        """
        for host in range(self.hosts) if hosts is None else hosts:
            if rate is None:
                # Fails harmlessly if no limit is set.
                _inside(self.namespace_pid(host), "tc", "qdisc", "del", "dev", "eth0", "root", check=False)
            else:
                self._replace_queue(host, "tbf", "rate", rate, "burst", _BURST, "latency", "50ms")
            self._rates[host] = rate

    def _replace_queue(self, host: int, *kind: str) -> None:
        _inside(self.namespace_pid(host), "tc", "qdisc", "replace", "dev", "eth0", "root", *kind)

    def add_delay(self, seconds: float) -> None:
        """Delays every packet that hosts send; throttles them to 256 kbit/s if the kernel has no netem.

        Args:
            seconds: Delay per packet.

        Raises:
            RuntimeError: The kernel supports neither.
        """
        delay = f"{seconds * 1000:.3f}ms"
        for host in range(self.hosts):
            try:
                self._replace_queue(host, "netem", "delay", delay)
            except RuntimeError:
                # The queue holds what arrives within the delay, and drains at a modem's rate.
                self._replace_queue(host, "tbf", "rate", "256kbit", "burst", "4kb", "latency", delay)

    def cut_link(self, host: int) -> None:
        """Disconnects a host silently: no packet reaches or leaves it, and no connection is reset."""
        self._set_link(host, "down")

    def restore_links(self) -> None:
        """Undoes :meth:`cut_link` and :meth:`add_delay`."""
        for host, rate in enumerate(self._rates):
            self._set_link(host, "up")
            self.set_rate(rate, [host])

    def _set_link(self, host: int, state: str) -> None:
        _inside(self.namespace_pid(self.hosts), "ip", "link", "set", _port(host), state)

    def power_off(self, host: int) -> None:
        """Simulates a power failure. The link goes down first, so that no peer sees the processes end."""
        _inside(self.namespace_pid(host), "ip", "link", "set", "eth0", "down")
        self._holders[host].kill()
        self._holders[host].wait()

    def start(
        self,
        host: int,
        command: Sequence[str],
        variables: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> subprocess.Popen[bytes]:
        """Starts a command on a host.

        Args:
            host: Number of the host, from 0.
            command: Program and arguments, found through this process's ``PATH`` and working directory.
            variables: Environment variables. They override :func:`rendezvous_variables` and ``GLOO_SOCKET_IFNAME``,
                which in turn override this process's environment.
            log: File to which the output is appended; by default the output goes to the returned process's ``stdout``.

        Returns:
            A process that forwards signals to the command, kills it when killed, and ends with its exit status.
        """
        environment = {
            **os.environ,
            "GLOO_SOCKET_IFNAME": "eth0",
            **rendezvous_variables(host, self.hosts),
            **(variables or {}),
        }
        full_command = [*_enter_command(self.namespace_pid(host)), *command]

        def popen(output: int) -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                full_command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Else the command would get a terminal's signals twice: directly and forwarded.
                start_new_session=True,
            )

        if log is None:
            return popen(subprocess.PIPE)
        with log.open("ab") as file:
            return popen(file.fileno())


def host_name(host: int) -> str:
    """The name of a host, counted from 0."""
    return f"host{host}"


def address(host: int) -> str:
    """The IPv4 address of a host, counted from 0."""
    return f"10.78.0.{_FIRST_ADDRESS + host}"


def _port(host: int) -> str:
    """Name of the switch's interface to a host."""
    return f"port{host}"


def rendezvous_variables(host: int, hosts: int) -> dict[str, str]:
    """Environment variables with which a command on a host finds the other hosts.

    ``PET_*`` are defaults of torchrun's options. The others serve a job of one rank per host that is started without
    torchrun; torchrun overwrites them.

    Args:
        host: Number of the host, from 0.
        hosts: Number of hosts.
    """
    return {
        "PET_NNODES": str(hosts),
        "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ENDPOINT": f"{address(0)}:{_RENDEZVOUS_PORT}",
        "PET_RDZV_ID": "testnet",
        "PET_RDZV_CONF": f"is_host={int(host == 0)}",
        "PET_LOCAL_ADDR": address(host),
        "PET_NODE_RANK": str(host),
        "RANK": str(host),
        "WORLD_SIZE": str(hosts),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": address(0),
        # Another port than torchrun's rendezvous, for commands that use both.
        "MASTER_PORT": str(_RENDEZVOUS_PORT + 1),
    }


def payload_bytes_sent() -> int:
    """Bytes that this host's ``eth0`` has sent, without packet headers. Must run on the host.

    Raises:
        FileNotFoundError: There is no ``eth0``.
    """
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "eth0":
            total, packets = (int(counters.split()[column]) for column in (8, 9))
            return total - _HEADER_BYTES * packets
    raise FileNotFoundError("this host has no eth0")


def is_entry_process(process: int) -> bool:
    """Whether a process only forwards signals to a command on a host, as :meth:`VirtualNetwork.start`'s result does."""
    try:
        return enter.__file__ in Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        # The process has ended meanwhile.
        return False


def running_networks() -> dict[str, dict[str, int]]:
    """Finds all test networks of this machine.

    Returns:
        For each network's name, the process number of each holder by host name; the switch is among them.
    """
    networks: dict[str, dict[str, int]] = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            # The process has ended meanwhile.
            continue
        if words[0] == "unshare" and _MARK in words:
            name, host = words[words.index(_MARK) + 1 :][:2]
            networks.setdefault(name, {})[host] = int(path.parent.name)
    return networks


def shut_down(name: str | None = None) -> list[str]:
    """Removes test networks of this machine and kills every process in them; returns when their holders have ended.

    Args:
        name: Name of the network; by default all.

    Returns:
        Names of the removed networks.
    """
    networks = {candidate: hosts for candidate, hosts in running_networks().items() if name in (None, candidate)}
    holders = {holder for hosts in networks.values() for holder in hosts.values()}
    for holder in holders:
        # The network may be ending by itself.
        with contextlib.suppress(ProcessLookupError):
            os.kill(holder, signal.SIGKILL)
    deadline = time.monotonic() + _END_SECONDS
    # A killed process is there a moment longer, and its network would be taken for a running one.
    while time.monotonic() < deadline and holders & {
        holder for hosts in running_networks().values() for holder in hosts.values()
    }:
        time.sleep(0.01)
    return sorted(networks)


def command_inside(holder: int, command: Sequence[str]) -> list[str]:
    """The command line that runs a command on a host.

    Args:
        holder: Process number of the host's holder; see :meth:`VirtualNetwork.namespace_pid` and
            :func:`running_networks`.
        command: Program and arguments.
    """
    return [*_enter_command(holder), *command]


def _start_holder(network: str, host: str, table: Path) -> subprocess.Popen[str]:
    spaces = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    return subprocess.Popen(
        ["unshare", *spaces, "sh", "-c", _HOLDER_SCRIPT, _MARK, network, host, str(table)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A terminal's Ctrl-C must reach the commands, not the holder.
        start_new_session=True,
    )


def _enter_command(holder: int) -> list[str]:
    return [*_python_command(enter.__file__), str(holder)]


def _python_command(script: str) -> list[str]:
    # Without site-packages, so that it starts fast.
    return [sys.executable, "-I", "-S", script]


def _inside(holder: int, *command: str, lines: Sequence[str] = (), check: bool = True) -> None:
    """Runs a tool in a host's network namespace."""
    _run("nsenter", "--target", str(holder), "--net", *command, lines=lines, check=check)


def _run(*command: str, lines: Sequence[str] = (), check: bool = True) -> None:
    done = subprocess.run(command, input="\n".join(lines) + "\n", check=False, capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
