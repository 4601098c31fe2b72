"""Hosts on this machine: each for itself, joined by links as they were asked for, and gone in the end."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distrain.testnet import network
from distrain.testnet.network import Network
from tests.hosts import needs_network, run_on_hosts

pytestmark = needs_network


def said(net: Network, host: int, script: str) -> str:
    """What a Python script prints on a host."""
    process = net.start(host, [sys.executable, "-I", "-S", "-c", script])
    text, _ = process.communicate(timeout=20)
    assert process.returncode == 0, text
    return text.decode().strip()


@pytest.fixture(scope="module")
def pair() -> Iterator[Network]:
    with Network(2) as net:
        yield net


def test_host_has_its_own_name_interface_and_processes(pair: Network) -> None:
    assert said(pair, 1, "import socket; print(socket.gethostname())") == "host1"
    assert said(pair, 0, "import socket; print(*sorted(name for _, name in socket.if_nameindex()))") == "eth0 lo"
    assert said(pair, 0, "import socket; print(socket.gethostbyname('host1'))") == pair.address(1)
    assert int(said(pair, 0, "import os; print(sum(name.isdigit() for name in os.listdir('/proc')))")) < 10
    assert said(pair, 0, "import os; print(os.environ['GLOO_SOCKET_IFNAME'], os.environ['PET_NNODES'])") == "eth0 2"


def test_command_starts_where_it_is_typed(pair: Network) -> None:
    assert said(pair, 0, "import os; print(os.getcwd())") == str(Path.cwd())


def test_exit_code_and_signals_reach_through(pair: Network) -> None:
    ends = pair.start(0, ["sh", "-c", "exit 7"])
    assert ends.wait(10) == 7
    missing = pair.start(0, ["no-such-command"])
    assert missing.communicate(timeout=10)[0].decode() == "no-such-command: No such file or directory\n"
    assert missing.returncode == 127
    waits = pair.start(0, ["sh", "-c", "trap 'echo asked; exit 5' TERM; echo up; sleep 60 & wait"])
    assert waits.stdout is not None
    assert waits.stdout.readline() == b"up\n"
    waits.send_signal(signal.SIGTERM)
    assert waits.communicate(timeout=10)[0] == b"asked\n"
    assert waits.returncode == 5
    dies = pair.start(0, ["sleep", "60"])
    dies.kill()
    assert dies.wait(10) == -signal.SIGKILL
    wait_until(lambda: "sleep" not in said(pair, 0, PROCESSES))


#: The names of a host's processes.
PROCESSES = "import pathlib; print([p.read_text() for p in pathlib.Path('/proc').glob('[0-9]*/comm')])"


def wait_until(holds: object, seconds: float = 10) -> None:
    assert callable(holds)
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "did not come about in time"
        time.sleep(0.05)


def exchange(sizes: list[int], replies: int) -> tuple[list[float], int]:
    """Rank 0 sends messages over TCP, each answered by one byte: seconds of each; rank 1: bytes that came."""
    with socket.socket() as listener:
        if network.rendezvous(0, 2)["MASTER_ADDR"] not in own_addresses():
            listener.bind(("", 5000))
            listener.listen()
            connection, _ = listener.accept()
            with connection:
                total = 0
                for size in sizes * replies:
                    left = size
                    while left:
                        left -= len(connection.recv(min(left, 1 << 20)))
                    total += size
                    connection.sendall(b".")
            return [], total
    found = []
    with connect(network.address(1), 5000) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for size in sizes * replies:
            begin = time.monotonic()
            connection.sendall(bytes(size))
            assert connection.recv(1) == b"."
            found.append(time.monotonic() - begin)
    return found, 0


def own_addresses() -> list[str]:
    return [socket.gethostbyname(socket.gethostname())]


def connect(address: str, port: int) -> socket.socket:
    deadline = time.monotonic() + 10
    while True:
        try:
            return socket.create_connection((address, port), timeout=20)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_rate_limits_what_a_host_sends(pair: Network) -> None:
    pair.limit("20mbit", [0])
    try:
        slow = run_on_hosts(pair, exchange, [1_000_000], 1)[0][0][0]
    finally:
        pair.limit(None)
    # What fits the token bucket goes at once: 744 kB remain for 2.5 MB a second.
    assert 0.25 < slow < 0.8
    assert run_on_hosts(pair, exchange, [1_000_000], 1)[0][0][0] < 0.1


def test_rate_that_is_none_is_refused(pair: Network) -> None:
    with pytest.raises(RuntimeError, match="fast"):
        pair.limit("fast")


def test_delay_holds_each_packet_back() -> None:
    with Network(2, delay=0.02) as net:
        found = run_on_hosts(net, exchange, [10], 5)[0][0]
    # There and back.
    assert 0.04 <= min(found) < 0.06


def count_datagrams(count: int) -> int:
    """Rank 0 sends datagrams; rank 1 says how many came."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        if network.address(1) in own_addresses():
            sock.bind(("", 5001))
            sock.settimeout(20)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
            came = 0
            while sock.recv(100) != b"end":
                came += 1
            return came
        # The other may not be there yet; nobody counts what comes before it is.
        time.sleep(0.5)
        for _ in range(count):
            sock.sendto(b"datagram", (network.address(1), 5001))
        for _ in range(50):
            sock.sendto(b"end", (network.address(1), 5001))
        return 0


def test_loss_takes_its_share_of_the_packets() -> None:
    with Network(2, loss=0.2) as net:
        came = run_on_hosts(net, count_datagrams, 1000)[1]
    # Four standard deviations around 800.
    assert 750 <= came <= 850


def test_lost_host_says_nothing(pair: Network) -> None:
    with Network(2) as net:
        listens = net.start(1, ["sleep", "60"])
        net.lose(1)
        assert listens.wait(10) == -signal.SIGKILL
        script = f"import socket; s = socket.socket(); s.settimeout(0.3); print(s.connect_ex(('{net.address(1)}', 80)))"
        # No answer, where a host that is up refuses.
        assert said(net, 0, script) == "11"
        assert said(pair, 0, script) == "111"


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    with Network(2, name="short") as net:
        stays = net.start(1, ["sh", "-c", "trap '' TERM HUP; (trap '' TERM HUP; sleep 60) & sleep 60"])
        assert "short" in network.running()
    assert stays.wait(10) == -signal.SIGKILL
    assert "short" not in network.running()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_of_a_maker_that_is_stopped(number: signal.Signals, tmp_path: Path) -> None:
    marker = tmp_path / "left-behind"
    command = ["sh", "-c", f"trap '' HUP; : >{marker}.$(hostname); exec sleep 61.7"]
    launcher = Path(__file__).parents[2] / "launch" / "testnet.py"
    maker = subprocess.Popen(
        [sys.executable, str(launcher), "hosts=2", f"name={tmp_path.name}", "--", *command],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": str(launcher.parents[1])},
        start_new_session=True,
    )
    try:
        wait_until(lambda: len(list(tmp_path.iterdir())) == 2, 20)
        maker.send_signal(number)
        assert maker.wait(10) == (-number if number == signal.SIGKILL else 128 + number)
        wait_until(lambda: tmp_path.name not in network.running())
        wait_until(lambda: not sleeping("61.7"))
    finally:
        maker.kill()


def sleeping(seconds: str) -> bool:
    """Whether a `sleep` of so many seconds runs anywhere on this machine."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes() == f"sleep\0{seconds}\0".encode():
                return True
        except OSError:
            continue
    return False


def test_down_ends_the_network_that_is_named() -> None:
    with Network(1, name="named") as net, Network(1, name="other"):
        waits = net.start(0, ["sleep", "60"])
        assert network.down("named") == ["named"]
        assert waits.wait(10) == -signal.SIGKILL
        assert "named" not in network.running()
        assert "other" in network.running()
    assert network.down("named") == []


def test_too_many_hosts_are_refused() -> None:
    with pytest.raises(ValueError, match="1 to 154 hosts, not 155"):
        Network(155)
