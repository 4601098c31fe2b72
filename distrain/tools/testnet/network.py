"""The hosts and their links.

Each host is a set of Linux namespaces: its own processes, network interface ``eth0``, host name and ``/etc/hosts``; it
shares the machine's cores and file system. None of them has a name in the file system. They are held by one process a
host, which ends when the process that made the network does, however that ends; the kernel then ends all that still
runs there and takes the interfaces away.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from distrain.tools.testnet import enter, relay

# Smaller token buckets are erratic at 1 Gbit/s.
_BURST = "256kb"
# Ethernet, IPv4, and TCP with time stamps.
_HEADERS = 14 + 20 + 32
#: Addresses end in at least three digits, because torchrun's rendezvous sorts hosts by address, as text.
_FIRST_ADDRESS = 101
_MOST_HOSTS = 154
#: How the processes that hold hosts are found again.
_MARK = "distrain-testnet"
_SWITCH = "switch"
#: What holds a host: process 1 there, which waits for the end of its input. Ignored children leave no zombies.
_HOLD = """\
hostname "$2" && mount --bind "$3" /etc/hosts && ip link set lo up || exit 1
trap '' CHLD
echo ready
exec cat >/dev/null
"""
_TOOLS = ("ip", "tc", "unshare", "nsenter", "mount", "hostname")
#: Where hosts meet unless their command says otherwise.
_PORT = 29500


def lacking() -> str | None:
    """Why there can be no test network here, in one line; ``None`` where there can."""
    if sys.platform != "linux":
        return "a test network needs Linux"
    if os.geteuid():
        return "a test network needs root (or the root of a namespace: unshare --user --map-root-user COMMAND)"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"a test network needs {', '.join(missing)}, from the packages iproute2, util-linux, mount and hostname"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--pid", "--fork", "--mount-proc", "true"],
        check=False,
        capture_output=True,
        text=True,
    )
    if tried.returncode:
        return f"a test network needs the right to make namespaces ({tried.stderr.strip()})"
    return None


class Network:
    """``with Network(2) as network:`` makes hosts 0 and 1, and removes them and all that runs there in the end.

    Args:
        hosts: How many, up to 154.
        delay: Seconds that each packet takes from one host to another.
        loss: Share of the packets that don't arrive, from 0 to 1.
        names: Whether hosts know each other's and their own names.
        name: What the network is called among those of this machine.

    Raises:
        RuntimeError: There can't be one here; says why.
    """

    def __init__(
        self, hosts: int, *, delay: float = 0.0, loss: float = 0.0, names: bool = True, name: str | None = None
    ) -> None:
        if not 1 <= hosts <= _MOST_HOSTS:
            raise ValueError(f"a test network has 1 to {_MOST_HOSTS} hosts, not {hosts}")
        self.hosts = hosts
        self.name = name or str(os.getpid())
        self._delay, self._loss, self._names = delay, loss, names
        self._rates: list[str | None] = [None] * hosts
        self._holders: list[subprocess.Popen[str]] = []
        self._relay: subprocess.Popen[str] | None = None

    def __enter__(self) -> Network:
        reason = lacking()
        if reason is not None:
            raise RuntimeError(reason)
        try:
            self._make_hosts()
            self._join_hosts()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._remove()

    def _make_hosts(self) -> None:
        # The mounts outlive the file.
        with tempfile.TemporaryDirectory() as folder:
            table = Path(folder, "hosts")
            known = [f"{address(host)} {host_name(host)}" for host in range(self.hosts)] if self._names else []
            table.write_text("\n".join(["127.0.0.1 localhost", *known]) + "\n")
            # Theirs to read, whoever runs there.
            Path(folder).chmod(0o755)
            for name in [*map(host_name, range(self.hosts)), _SWITCH]:
                self._holders.append(_hold(self.name, name, table))
            for holder in self._holders:
                assert holder.stdout is not None and holder.stderr is not None
                if not holder.stdout.readline():
                    raise RuntimeError(f"can't make a host: {holder.stderr.read().strip()}")

    def _join_hosts(self) -> None:
        switch = self.holder(self.hosts)
        ports = [_port(host) for host in range(self.hosts)]
        relayed = self._delay > 0 or self._loss > 0
        # All from inside, where the root of a user namespace may do it too.
        lines = [] if relayed else ["link add bridge type bridge", "link set bridge up"]
        for host, port in enumerate(ports):
            far = f"name eth0 address {relay.hardware_address(host)} netns {self.holder(host)}"
            lines.append(f"link add {port} type veth peer {far}")
            lines.append(f"link set {port} up" if relayed else f"link set {port} master bridge up")
        _inside(switch, "ip", "-batch", "-", lines=lines)
        for host in range(self.hosts):
            # One packet is then one frame, and is lost by itself.
            single = ["link set eth0 gso_max_segs 1"] if self._loss > 0 else []
            lines = [f"addr add {address(host)}/24 dev eth0", *single, "link set eth0 up"]
            _inside(self.holder(host), "ip", "-batch", "-", lines=lines)
        if relayed:
            command = [*_python(relay.__file__), str(self._delay), str(self._loss), *ports]
            self._relay = subprocess.Popen(
                [*_entered(switch), *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
            )
            assert self._relay.stdout is not None
            if not self._relay.stdout.readline():
                raise RuntimeError("the relay that delays packets did not start; its error stands above")

    def _remove(self) -> None:
        for holder in self._holders:
            # Its child, process 1 of the host, goes with it, and with that all processes there.
            holder.kill()
        for process in [*self._holders, *([self._relay] if self._relay else [])]:
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        self._holders.clear()
        self._relay = None

    def holder(self, host: int) -> int:
        """The number of the process whose namespaces are the host's; see :func:`distrain.tools.testnet.enter.enter`."""
        return self._holders[host].pid

    def address(self, host: int) -> str:
        """A host's IPv4 address."""
        return address(host)

    def limit(self, rate: str | None, hosts: Iterable[int] | None = None) -> None:
        """Sets what hosts may send, each for itself, and ends :meth:`slow` for them.

        Args:
            rate: As ``tc`` writes it, like ``100mbit``; ``None`` for no limit.
            hosts: Which; by default all.

        Raises:
            RuntimeError: The rate is none.
        """
        for host in range(self.hosts) if hosts is None else hosts:
            if rate is None:
                # There may be none to take away.
                _inside(self.holder(host), "tc", "qdisc", "del", "dev", "eth0", "root", check=False)
            else:
                self._queue(host, "tbf", "rate", rate, "burst", _BURST, "latency", "50ms")
            self._rates[host] = rate

    def _queue(self, host: int, *kind: str) -> None:
        _inside(self.holder(host), "tc", "qdisc", "replace", "dev", "eth0", "root", *kind)

    def slow(self, seconds: float) -> None:
        """Lets all that hosts send arrive later from now on, or crawl where this kernel can't do that.

        Args:
            seconds: How much later.

        Raises:
            RuntimeError: The kernel can do neither.
        """
        late = f"{seconds * 1000:.3f}ms"
        for host in range(self.hosts):
            try:
                self._queue(host, "netem", "delay", late)
            except RuntimeError:
                # The queue holds as much as arrives meanwhile, and no more is let out than a modem would.
                self._queue(host, "tbf", "rate", "256kbit", "burst", "4kb", "latency", late)

    def cut(self, host: int) -> None:
        """Takes a host's cable out: nothing arrives there or leaves it, and nobody is told."""
        self._plug(host, "down")

    def mend(self) -> None:
        """Ends what :meth:`cut` and :meth:`slow` did."""
        for host, rate in enumerate(self._rates):
            self._plug(host, "up")
            self.limit(rate, [host])

    def _plug(self, host: int, state: str) -> None:
        _inside(self.holder(self.hosts), "ip", "link", "set", _port(host), state)

    def lose(self, host: int) -> None:
        """Cuts a host's power: its link is dead at once, so that nobody hears of the end of its processes."""
        _inside(self.holder(host), "ip", "link", "set", "eth0", "down")
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
            host: Which.
            command: Program and arguments; found and run as here.
            variables: Added to this process's environment, to ``GLOO_SOCKET_IFNAME`` and to :func:`rendezvous`.
            log: The file that takes what it prints, behind what stands there; by default the pipe ``stdout`` of what is
                returned takes it.

        Returns:
            A process that hands signals on to the command, dies with it, and ends as it ends.
        """
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", **rendezvous(host, self.hosts), **(variables or {})}
        entered = [*_entered(self.holder(host)), *command]

        def popen(output: int) -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                entered,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Signals of a terminal are handed on, not doubled.
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
    """The switch's end of a host's cable."""
    return f"port{host}"


def rendezvous(host: int, hosts: int) -> dict[str, str]:
    """What a command on a host needs in its environment to find the others.

    ``PET_*`` are torchrun's, where its own options don't say otherwise; the rest is for one rank a host without
    torchrun, which sets them itself.
    """
    return {
        "PET_NNODES": str(hosts),
        "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ENDPOINT": f"{address(0)}:{_PORT}",
        "PET_RDZV_ID": "testnet",
        "PET_RDZV_CONF": f"is_host={int(host == 0)}",
        "PET_LOCAL_ADDR": address(host),
        "PET_NODE_RANK": str(host),
        "RANK": str(host),
        "WORLD_SIZE": str(hosts),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": address(0),
        # torchrun hands its own on; this one must differ for a command that uses both.
        "MASTER_PORT": str(_PORT + 1),
    }


def payload_sent() -> int:
    """Bytes that this host's interface has sent, less the headers of its packets; called on the host."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, figures = line.partition(":")
        if name.strip() == "eth0":
            total, packets = (int(figures.split()[column]) for column in (8, 9))
            return total - _HEADERS * packets
    raise FileNotFoundError("this host has no eth0")


def leads_in(process: int) -> bool:
    """Whether a process only leads a command into a host, as what :meth:`Network.start` returns does."""
    try:
        return enter.__file__ in Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        # It has ended meanwhile.
        return False


def running() -> dict[str, dict[str, int]]:
    """All test networks of this machine: by name, the holder of each host and of the switch by host name."""
    found: dict[str, dict[str, int]] = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            # It has ended meanwhile.
            continue
        if words[0] == "unshare" and _MARK in words:
            name, host = words[words.index(_MARK) + 1 :][:2]
            found.setdefault(name, {})[host] = int(path.parent.name)
    return found


def down(name: str | None = None) -> list[str]:
    """Ends test networks of this machine, and all that runs in them.

    Args:
        name: Which; by default all.

    Returns:
        The names of those that were ended.
    """
    found = {each: hosts for each, hosts in running().items() if name in (None, each)}
    for hosts in found.values():
        for holder in hosts.values():
            os.kill(holder, signal.SIGKILL)
    return sorted(found)


def command_on(holder: int, command: Sequence[str]) -> list[str]:
    """The command that runs a command on a host.

    Args:
        holder: See :meth:`Network.holder` and :func:`running`.
        command: Program and arguments.
    """
    return [*_entered(holder), *command]


def _hold(network: str, host: str, table: Path) -> subprocess.Popen[str]:
    spaces = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    return subprocess.Popen(
        ["unshare", *spaces, "sh", "-c", _HOLD, _MARK, network, host, str(table)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A terminal's Ctrl-C is for the commands.
        start_new_session=True,
    )


def _entered(holder: int) -> list[str]:
    return [*_python(enter.__file__), str(holder)]


def _python(script: str) -> list[str]:
    # Nothing but the standard library, so that it starts at once.
    return [sys.executable, "-I", "-S", script]


def _inside(holder: int, *command: str, lines: Sequence[str] = (), check: bool = True) -> None:
    """Runs a tool in a host's network alone."""
    _run("nsenter", "--target", str(holder), "--net", *command, lines=lines, check=check)


def _run(*command: str, lines: Sequence[str] = (), check: bool = True) -> None:
    done = subprocess.run(command, input="\n".join(lines) + "\n", check=False, capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
