"""One training on several plain hosts: a torchrun agent on each, started over ssh, watched and ended together."""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from distrain.tools.launching.processes import Asked, Child, asked_to_end

#: How much longer than its grace a host may take to say how it ended.
_PATIENCE_SECONDS = 10


@dataclass(frozen=True)
class Agent:
    """What is started for one host.

    Attributes:
        host: Its name, which stands before each line of its output.
        command: What is run here.
    """

    host: str
    command: tuple[str, ...]


def run(agents: Sequence[Agent], grace_seconds: float) -> int:
    """Runs all until they end, and ends all when one fails or this process is asked to end.

    Args:
        agents: What to start.
        grace_seconds: Each host's own time between being asked to end and being killed.

    Returns:
        0 if all ended well; 128 + signal if this process was asked to end; else the code of the first that failed.
    """
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()
    children: list[Child] = []
    code = 0
    with asked_to_end():
        try:
            for agent in agents:
                children.append(Child(agent.command, output=subprocess.PIPE, held=True))
                threading.Thread(target=_follow, args=(agent.host, children[-1], len(children) - 1, ended)).start()
            for _ in agents:
                place = ended.get()
                code = children[place].wait() or 0
                if code:
                    _say(f"hosts: {agents[place].host} failed with exit code {code}; the others are ended")
                    break
        except Asked as asked:
            _say(f"hosts: {asked}; {len(agents)} hosts are asked to end")
            code = asked.code
        finally:
            _end(children, grace_seconds)
    return code


def _end(children: Sequence[Child], grace_seconds: float) -> None:
    """All hosts at once hear that it is over; those that don't answer are left to their own agent's clock."""
    for child in children:
        child.release()
    deadline = time.monotonic() + grace_seconds + _PATIENCE_SECONDS
    try:
        for child in children:
            child.wait(max(0.0, deadline - time.monotonic()))
    except Asked:
        _say("hosts: asked again; the hosts end without being waited for")
    finally:
        for child in children:
            child.clear()


def _follow(host: str, child: Child, place: int, ended: queue.SimpleQueue[int]) -> None:
    assert child.output is not None
    for line in child.output:
        _say(f"[{host}] {line.decode(errors='replace').rstrip()}")
    child.wait()
    ended.put(place)


def _say(line: str) -> None:
    # One call, so that lines of several hosts don't mix.
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
