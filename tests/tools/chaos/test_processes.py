"""Processes are found by the mark in their environment, whatever their parent is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distrain.tools.chaos import processes
from distrain.tools.testnet.network import VirtualNetwork
from tests.harness import HANG_SECONDS
from tests.hosts import needs_network

if sys.platform != "linux":
    pytest.skip("needs /proc", allow_module_level=True)

MARK = f"test.{os.getpid()}"


@pytest.fixture
def start() -> Iterator[Any]:
    def begin(command: list[str], **variables: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, processes.MARK_VARIABLE: MARK, **variables}
        return subprocess.Popen(command, env=environment, start_new_session=True)

    yield begin
    processes.kill_all(MARK)


def wait_for(count: int) -> None:
    wait_until(lambda: len(processes.marked_processes(MARK)) == count)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_children_and_orphans_have_the_mark_and_others_do_not(start: Any) -> None:
    start(["sleep", "60"])
    # Its parent ends at once.
    start(["sh", "-c", "sleep 60 & exit"]).wait()
    other = subprocess.Popen(["sleep", "60"])
    try:
        wait_for(2)
        assert other.pid not in processes.marked_processes(MARK)
        processes.kill_all(MARK)
        assert processes.marked_processes(MARK) == {}
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_rank_is_the_topmost_process_with_its_number(start: Any) -> None:
    first = start(["sh", "-c", "sleep 60 & wait"], RANK="0")
    second = start(["sleep", "60"], RANK="1")
    start(["sleep", "60"])
    wait_for(4)
    assert processes.rank_pids(MARK) == {0: first.pid, 1: second.pid}


@needs_network
def test_ranks_on_hosts_get_signals_from_outside() -> None:
    with VirtualNetwork(2) as net:
        # RANK is the host's number; a child of a rank has the same variable.
        command = ["sh", "-c", "sleep 60 & wait"]
        started = [net.start(host, command, {processes.MARK_VARIABLE: MARK}) for host in range(2)]
        # On each host the entry process, the shell, and its sleep.
        wait_for(6)
        ranks = processes.rank_pids(MARK)
        assert sorted(ranks) == [0, 1]
        assert all(program(pid) == "sh" for pid in ranks.values())
        assert processes.send_signal(ranks[0], signal.SIGSTOP)
        wait_until(lambda: state(ranks[0]) == "T")
        assert started[0].poll() is None
        assert processes.send_signal(ranks[1], signal.SIGKILL)
        assert started[1].wait(HANG_SECONDS) == -signal.SIGKILL
        # The child of the killed rank is left behind, and counted.
        wait_for(4)
        processes.kill_all(MARK)
        assert processes.marked_processes(MARK) == {}
        assert started[0].wait(HANG_SECONDS) == -signal.SIGKILL


def program(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_ended_process_gets_no_signal(start: Any) -> None:
    process = start(["sleep", "60"])
    assert processes.send_signal(process.pid, signal.SIGKILL)
    process.wait()
    assert not processes.send_signal(process.pid, signal.SIGKILL)


def test_started_process_reacts_to_sigint_though_this_one_ignores_it(start: Any) -> None:
    # As for a script's background commands, which ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        ignoring = start(["sleep", "60"])
        with processes.default_sigint():
            reacting = start(["sleep", "60"])
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    for process in (ignoring, reacting):
        process.send_signal(signal.SIGINT)
    assert reacting.wait(HANG_SECONDS) == -signal.SIGINT
    assert ignoring.poll() is None


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda n: n.name)
def test_trainings_end_with_the_process_that_started_them(number: signal.Signals, tmp_path: Path) -> None:
    script = (
        "import os, subprocess, sys\n"
        "from distrain.tools.chaos import processes\n"
        "with processes.ended_with_this_process():\n"
        "    environment = {**os.environ, processes.MARK_VARIABLE: f'{os.getpid()}.1'}\n"
        "    command = ['sh', '-c', 'sleep 600 & sleep 600']\n"
        "    subprocess.Popen(command, env=environment, start_new_session=True)\n"
        "    print('started', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"started\n"
    mark = f"{process.pid}.1"
    wait_until(lambda: len(processes.marked_processes(mark)) == 3)
    process.send_signal(number)
    process.wait()
    wait_until(lambda: not processes.marked_processes(mark))
    process.communicate()
