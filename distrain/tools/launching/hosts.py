"""Runs one command per host, relays their output, and ends all of them together."""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from distrain.tools.launching.processes import Child, TerminationRequested, termination_signals_raise

#: Seconds that a host may take beyond its grace period to report how it ended.
_EXTRA_SECONDS = 10


@dataclass(frozen=True)
class HostCommand:
    """The local command, usually ssh, that runs a training on one host.

    Attributes:
        host: The host's name, printed before each line of its output.
        command: Program and arguments.
    """

    host: str
    command: tuple[str, ...]


def run_on_hosts(commands: Sequence[HostCommand], grace_seconds: float) -> int:
    """Runs all commands until they end; ends all when one fails or this process is asked to end.

    Args:
        commands: One command per host.
        grace_seconds: Time that each host gives its processes between SIGTERM and killing them.

    Returns:
        0 if all succeeded; 128 + signal if this process was asked to end; else the exit code of the first that failed.
    """
    finished: queue.SimpleQueue[int] = queue.SimpleQueue()
    children: list[Child] = []
    code = 0
    with termination_signals_raise():
        try:
            for index, command in enumerate(commands):
                children.append(Child(command.command, output=subprocess.PIPE, pipe_stdin=True))
                threading.Thread(target=_relay_output, args=(command.host, children[-1], index, finished)).start()
            for _ in commands:
                index = finished.get()
                code = children[index].wait() or 0
                if code:
                    _print_line(f"hosts: {commands[index].host} failed with exit code {code}; ending the others")
                    break
        except TerminationRequested as request:
            _print_line(f"hosts: {request}; ending {len(commands)} hosts")
            code = request.code
        finally:
            _end_all(children, grace_seconds)
    return code


def _end_all(children: Sequence[Child], grace_seconds: float) -> None:
    """Asks all hosts to end by closing their standard input; their agents kill what does not end in time."""
    for child in children:
        child.close_stdin()
    deadline = time.monotonic() + grace_seconds + _EXTRA_SECONDS
    try:
        for child in children:
            child.wait(max(0.0, deadline - time.monotonic()))
    except TerminationRequested:
        _print_line("hosts: second request; no longer waiting for the hosts, which end by themselves")
    finally:
        for child in children:
            child.kill_all()


def _relay_output(host: str, child: Child, index: int, finished: queue.SimpleQueue[int]) -> None:
    assert child.output is not None
    for line in child.output:
        _print_line(f"[{host}] {line.decode(errors='replace').rstrip()}")
    child.wait()
    finished.put(index)


def _print_line(line: str) -> None:
    # A single write keeps lines of several hosts from mixing.
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
