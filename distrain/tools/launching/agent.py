"""Runs a command on a remote host, and ends it when the ssh connection that started it is closed.

``distrain hosts`` starts ``python -m distrain.tools.launching.agent GRACE_SECONDS COMMAND …`` over ssh. A command
started over ssh directly would keep running after the connection ends. The agent instead sends SIGTERM to the command
as soon as standard input is closed, and after the grace period kills it with all that it started.
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

from distrain.tools.launching.processes import Child, TerminationRequested, termination_signals_raise


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code.

    Args:
        arguments: Grace period in seconds, then the command.
    """
    grace, *command = arguments
    with termination_signals_raise():
        child = Child(command, output=subprocess.PIPE)
        assert child.output is not None
        relay = threading.Thread(target=_relay_output, args=(child.output,), daemon=True)
        relay.start()
        threading.Thread(target=_terminate_when_stdin_closes, daemon=True).start()
        try:
            code = child.wait()
        except TerminationRequested as request:
            child.terminate(float(grace))
            code = request.code
        finally:
            child.kill_all()
    relay.join(timeout=5)
    assert code is not None
    return code


def _terminate_when_stdin_closes() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _relay_output(output: IO[bytes]) -> None:
    """Copies the command's output to standard output.

    Keeps reading after standard output is closed, so that the command can still write while it saves its state.
    """
    connected = True
    while text := os.read(output.fileno(), 65536):
        if connected:
            connected = False
            with contextlib.suppress(OSError):
                sys.stdout.buffer.write(text)
                sys.stdout.buffer.flush()
                connected = True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
