"""Runs a command inside the namespaces of another process: ``python enter.py PID COMMAND...``.

util-linux's ``nsenter`` keeps signals to itself, and leaves the command behind when it is killed; this hands signals
on, ends as the command ended, and takes the command along when it is killed itself.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

#: The mount namespace is last: after it ``/proc`` shows the holder's processes only.
_SPACES = ("pid_for_children", "net", "uts", "mnt")
_PR_SET_PDEATHSIG = 1
_HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def enter(holder: int) -> None:
    """Moves the calling process, which must have one thread, into the holder's namespaces.

    Its process number stays as it is; only its children count in the holder's process namespace, and end with it.

    Args:
        holder: Process number of one that made network, host name, mount and process namespaces.

    Raises:
        OSError: The holder is gone, or the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    folder = Path.cwd()
    opened = [os.open(f"/proc/{holder}/ns/{space}", os.O_RDONLY) for space in _SPACES]
    for space, descriptor in zip(_SPACES, opened, strict=True):
        if libc.setns(descriptor, 0):
            number = ctypes.get_errno()
            raise OSError(number, f"can't enter namespace {space} of process {holder}: {os.strerror(number)}")
        os.close(descriptor)
    # Another mount namespace starts at its root.
    os.chdir(folder)


def run(holder: int, command: Sequence[str]) -> int:
    """Runs the command there until it ends.

    Returns:
        Its exit code; a negative number is the signal that ended it.

    Raises:
        OSError: As :func:`enter`.
    """
    enter(holder)
    # What comes before there is a child to hand it on to must wait.
    signal.pthread_sigmask(signal.SIG_BLOCK, _HANDED_ON)
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDED_ON)
        try:
            os.execvp(command[0], list(command))
        except OSError as error:
            print(f"{command[0]}: {error.strerror}", file=sys.stderr, flush=True)
            # As shells say it.
            os._exit(127)
    for number in _HANDED_ON:
        signal.signal(number, lambda number, _: os.kill(child, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDED_ON)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    """The command line."""
    code = run(int(sys.argv[1]), sys.argv[2:])
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main()
