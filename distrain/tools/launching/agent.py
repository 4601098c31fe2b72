"""Runs a command on a host as long as the one who asked for it is there.

``python -m distrain.tools.launching.agent GRACE_SECONDS COMMAND …`` is what ``launch/hosts.py`` starts over ssh. A
command that is started over ssh by itself goes on when the connection ends; this one is asked to end (SIGTERM) as soon
as the standard input is closed, and killed after the grace, with all that it started.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import IO

from distrain.tools.launching.processes import Asked, Child, asked_to_end


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    grace, *command = arguments
    with asked_to_end():
        child = Child(command, output=subprocess.PIPE)
        assert child.output is not None
        relay = threading.Thread(target=_relay, args=(child.output,), daemon=True)
        relay.start()
        threading.Thread(target=_until_closed, daemon=True).start()
        try:
            code = child.wait()
        except Asked as asked:
            child.end(float(grace))
            code = asked.code
        finally:
            child.clear()
    relay.join(timeout=5)
    assert code is not None
    return code


def _until_closed() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _relay(output: IO[bytes]) -> None:
    """Hands on what the command says; when nobody listens any more it may still say it while it saves its state."""
    listening = True
    while text := os.read(output.fileno(), 65536):
        if listening:
            listening = False
            with contextlib.suppress(OSError):
                sys.stdout.buffer.write(text)
                sys.stdout.buffer.flush()
                listening = True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
