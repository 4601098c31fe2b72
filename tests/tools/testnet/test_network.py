"""Virtual hosts are isolated, their links have the requested properties, and nothing is left of them afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distrain.tools.testnet import network
from distrain.tools.testnet.network import VirtualNetwork
from tests.harness import HANG_SECONDS
from tests.hosts import needs_network

pytestmark = needs_network


def run_script(net: VirtualNetwork, host: int, script: str) -> str:
    """Runs a Python script on a host and returns its output."""
    process = net.start(host, [sys.executable, "-I", "-S", "-c", script])
    text, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 0, text
    return text.decode().strip()


def start_script(net: VirtualNetwork, host: int, script: str, before: str = ":") -> subprocess.Popen[bytes]:
    """Starts a shell script on a host; returns once it is running."""
    process = net.start(host, ["sh", "-c", f"{before}; echo up; {script}"])
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    return process


@pytest.fixture(scope="module")
def pair() -> Iterator[VirtualNetwork]:
    with VirtualNetwork(2) as net:
        yield net


def test_host_has_its_own_name_interface_and_processes(pair: VirtualNetwork) -> None:
    assert run_script(pair, 1, "import socket; print(socket.gethostname())") == "host1"
    assert run_script(pair, 0, "import socket; print(*sorted(name for _, name in socket.if_nameindex()))") == "eth0 lo"
    assert run_script(pair, 0, "import socket; print(socket.gethostbyname('host1'))") == pair.address(1)
    assert int(run_script(pair, 0, "import os; print(sum(name.isdigit() for name in os.listdir('/proc')))")) < 10
    assert (
        run_script(pair, 0, "import os; print(os.environ['GLOO_SOCKET_IFNAME'], os.environ['PET_NNODES'])") == "eth0 2"
    )


def test_tcp_is_that_of_ordinary_hosts(pair: VirtualNetwork) -> None:
    allowed = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control").read_text().split()
    usual = "import socket; print(socket.socket().getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16))"
    kind = run_script(pair, 1, usual)
    assert "cubic" in kind or "cubic" not in allowed


def test_command_starts_where_it_is_typed(pair: VirtualNetwork) -> None:
    assert run_script(pair, 0, "import os; print(os.getcwd())") == str(Path.cwd())


def test_what_is_printed_goes_to_a_log(pair: VirtualNetwork, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = pair.start(1, ["sh", "-c", "echo $RANK; echo $MINE >&2"], {"MINE": "mine", "RANK": "7"}, log)
    assert process.wait(HANG_SECONDS) == 0
    assert log.read_text() == "7\nmine\n"
    assert pair.start(0, ["echo", "more"], log=log).wait(HANG_SECONDS) == 0
    assert log.read_text() == "7\nmine\nmore\n"


def test_exit_code_and_signals_reach_through(pair: VirtualNetwork) -> None:
    ends = pair.start(0, ["sh", "-c", "exit 7"])
    assert ends.wait(HANG_SECONDS) == 7
    missing = pair.start(0, ["no-such-command"])
    assert missing.communicate(timeout=HANG_SECONDS)[0].decode() == "no-such-command: No such file or directory\n"
    assert missing.returncode == 127
    waits = start_script(pair, 0, "sleep 60 >/dev/null 2>&1 & wait", before="trap 'echo asked; exit 5' TERM")
    waits.send_signal(signal.SIGTERM)
    assert waits.communicate(timeout=HANG_SECONDS)[0] == b"asked\n"
    assert waits.returncode == 5
    dies = start_script(pair, 0, "exec sleep 62.5")
    dies.kill()
    assert dies.wait(HANG_SECONDS) == -signal.SIGKILL
    wait_until(lambda: "62.5" not in run_script(pair, 0, PROCESSES))


#: Prints the command lines of a host's processes.
PROCESSES = "import pathlib; print([p.read_text() for p in pathlib.Path('/proc').glob('[0-9]*/cmdline')])"


def wait_until(holds: object) -> None:
    assert callable(holds)
    deadline = time.monotonic() + HANG_SECONDS
    while not holds():
        assert time.monotonic() < deadline, "did not come about in time"
        time.sleep(0.05)


#: Host 1 answers each message of `size` bytes with one byte; host 0 prints the seconds of the fastest round trip.
ANSWER = """
import socket
with socket.create_server(("", 5000)) as server:
    print("ready", flush=True)
    with server.accept()[0] as caller:
        for _ in range({count}):
            left = {size}
            while left:
                left -= len(caller.recv(left))
            caller.sendall(b".")
"""
ASK = """
import socket, time
found = []
with socket.create_connection(("{address}", 5000)) as caller:
    caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for _ in range({count}):
        begin = time.monotonic()
        caller.sendall(bytes({size}))
        assert caller.recv(1) == b"."
        found.append(time.monotonic() - begin)
print(min(found))
"""
#: Host 1 prints how many datagrams arrive from host 0. It answers each that carries a number with that number.
COUNT = """
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.bind(("", 5000))
    print("ready", flush=True)
    came = 0
    while True:
        content, sender = sock.recvfrom(100)
        if content == b"end":
            break
        if content == b"counted":
            came += 1
        else:
            sock.sendto(content, sender)
    print(came)
"""
#: A few at a time, until the answer to a number shows that those before it have passed: buffers on the way are small,
#: and what they drop on a busy machine is not the loss that is measured.
SEND = """
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.settimeout(0.05)
    sock.connect(("{address}", 5000))
    for burst in range({count} // 20):
        number = b"%d" % burst
        for _ in range(20):
            sock.send(b"counted")
        answer = b""
        while answer != number:
            sock.send(number)
            try:
                answer = sock.recv(100)
            except TimeoutError:
                continue
    for _ in range(50):
        sock.send(b"end")
"""


def talk(net: VirtualNetwork, server: str, client: str, **values: object) -> tuple[str, str]:
    """Runs a server script on host 1, then a client script on host 0; returns what both print."""
    serving = net.start(1, [sys.executable, "-I", "-S", "-c", server.format(**values)])
    assert serving.stdout is not None
    assert serving.stdout.readline() == b"ready\n"
    asked = run_script(net, 0, client.format(address=net.address(1), **values))
    return serving.communicate(timeout=HANG_SECONDS)[0].decode().strip(), asked


def fastest(net: VirtualNetwork, count: int, size: int) -> float:
    """Seconds of the fastest of `count` round trips, each with `size` bytes there and one byte back."""
    return float(talk(net, ANSWER, ASK, count=count, size=size)[1])


def test_rate_limits_what_a_host_sends(pair: VirtualNetwork) -> None:
    pair.set_rate("20mbit", [0])
    try:
        slow = fastest(pair, 3, 1_000_000)
    finally:
        pair.set_rate(None)
    # 256 kB fit the token bucket and pass at once; the other 744 kB pass at 2.5 MB/s. Later ones find it empty.
    assert 0.25 < slow < 3
    assert fastest(pair, 5, 1_000_000) < 0.25


def test_invalid_rate_is_refused(pair: VirtualNetwork) -> None:
    with pytest.raises(RuntimeError, match="fast"):
        pair.set_rate("fast")


def test_delay_holds_each_packet_back() -> None:
    with VirtualNetwork(2, delay=0.02) as net:
        # Once for the message and once for the answer.
        assert 0.04 <= fastest(net, 10, 10) < 0.1
        # Large frames pass too.
        assert 0.04 <= fastest(net, 2, 1_000_000) < 1


def test_loss_takes_its_share_of_the_packets() -> None:
    with VirtualNetwork(2, loss=0.2) as net:
        came = int(talk(net, COUNT, SEND, count=1000)[0])
    # Six standard deviations around 800: it is drawn anew each time.
    assert 724 <= came <= 876


#: Host 1 returns every datagram; host 0 prints the seconds of the first answered attempt, or None.
ECHO = """
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.bind(("", 7000))
    while True:
        sock.sendto(*sock.recvfrom(2000))
"""
CALL = """
import socket, time
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.settimeout(0.3)
    for number in range({attempts}):
        begin = time.monotonic()
        sock.sendto(b"%1000d" % number, ("{address}", 7000))
        try:
            while int(sock.recv(2000)) != number:
                pass
            print(time.monotonic() - begin)
            break
        except OSError:
            pass
    else:
        print(None)
"""


@pytest.mark.parametrize("delay", [0.0, 0.001])
def test_cut_link_passes_nothing_until_it_is_restored(delay: float) -> None:
    with VirtualNetwork(2, delay=delay) as net:
        net.start(1, [sys.executable, "-I", "-S", "-c", ECHO])
        called = CALL.format(attempts=50, address=net.address(1))
        assert run_script(net, 0, called) != "None"
        net.cut_link(1)
        assert run_script(net, 0, CALL.format(attempts=3, address=net.address(1))) == "None"
        net.restore_links()
        assert run_script(net, 0, called) != "None"


def test_links_are_slow_until_they_are_restored(pair: VirtualNetwork) -> None:
    pair.set_rate("20mbit", [0])
    try:
        pair.add_delay(0.05)
        # Delayed by netem, or throttled by a bucket of 4 kB that refills at 32 kB/s.
        assert fastest(pair, 1, 8_000) > 0.04
        pair.restore_links()
        assert fastest(pair, 5, 8_000) < 0.04
        # The former rate applies again.
        assert fastest(pair, 1, 1_000_000) > 0.25
    finally:
        pair.set_rate(None)
    assert fastest(pair, 5, 1_000_000) < 0.25


def test_only_the_process_outside_the_host_is_an_entry_process(pair: VirtualNetwork) -> None:
    waits = start_script(pair, 0, "exec sleep 60.25")
    assert network.is_entry_process(waits.pid)
    assert not network.is_entry_process(inside(waits.pid))
    waits.kill()
    waits.wait()
    assert not network.is_entry_process(waits.pid)


def inside(process: int) -> int:
    """Process number of a process's only child."""
    return int(Path(f"/proc/{process}/task/{process}/children").read_text())


def test_powered_off_host_does_not_answer(pair: VirtualNetwork) -> None:
    with VirtualNetwork(2) as net:
        stays = start_script(net, 1, "exec sleep 60")
        net.power_off(1)
        assert stays.wait(HANG_SECONDS) == -signal.SIGKILL
        script = "import socket; s = socket.socket(); s.settimeout({}); print(s.connect_ex(('{}', 80)))"
        # EAGAIN: no answer. A running host refuses the connection: ECONNREFUSED.
        assert run_script(net, 0, script.format(0.3, net.address(1))) == "11"
        assert run_script(pair, 0, script.format(HANG_SECONDS, pair.address(1))) == "111"


def test_no_process_outlives_the_network() -> None:
    name = f"short-{os.getpid()}"
    with VirtualNetwork(2, name=name) as net:
        stays = start_script(net, 1, "trap '' TERM HUP; sleep 60 & sleep 60")
        assert name in network.running_networks()
    assert stays.wait(HANG_SECONDS) == -signal.SIGKILL
    assert name not in network.running_networks()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_network_ends_with_the_process_that_made_it(number: signal.Signals, tmp_path: Path) -> None:
    marker, name, seconds = tmp_path / "left-behind", f"ends-{os.getpid()}", f"617.{os.getpid()}"
    command = ["sh", "-c", f"trap '' HUP; : >{marker}.$(hostname); exec sleep {seconds}"]
    launcher = Path(__file__).parents[3] / "launch" / "testnet.py"
    maker = subprocess.Popen(
        [sys.executable, str(launcher), "hosts=2", f"name={name}", "--", *command],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": str(launcher.parents[1])},
        start_new_session=True,
    )
    try:
        wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
        maker.send_signal(number)
        assert maker.wait(HANG_SECONDS) == (-number if number == signal.SIGKILL else 128 + number)
        wait_until(lambda: name not in network.running_networks())
        wait_until(lambda: not sleeping(seconds))
    finally:
        maker.kill()


def sleeping(seconds: str) -> bool:
    """Whether a `sleep` with this argument runs anywhere on this machine."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes() == f"sleep\0{seconds}\0".encode():
                return True
        except OSError:
            continue
    return False


def test_shut_down_removes_only_the_named_network() -> None:
    # Several runs of these tests may share a machine.
    named, other = f"named-{os.getpid()}", f"other-{os.getpid()}"
    with VirtualNetwork(1, name=named) as net, VirtualNetwork(1, name=other):
        waits = start_script(net, 0, "exec sleep 60")
        assert network.shut_down(named) == [named]
        assert waits.wait(HANG_SECONDS) == -signal.SIGKILL
        assert named not in network.running_networks()
        assert other in network.running_networks()
    assert network.shut_down(named) == []


def test_too_many_hosts_are_refused() -> None:
    with pytest.raises(ValueError, match="1 to 154 hosts, not 155"):
        VirtualNetwork(155)
