"""Runs a command inside the namespaces of another process: ``python enter.py PID COMMAND...``.

util-linux's ``nsenter`` keeps signals to itself, and leaves the command behind when it is killed; this hands signals
on, ends as the command ended, and takes the command along when it is killed itself.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

#: The mount namespace is last: after it ``/proc`` shows the holder's processes only.
_SPACES = ("pid_for_children", "net", "uts", "mnt")
_PR_SET_PDEATHSIG = 1
_HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def enter(holder: int) -> None:
    """The calling process, which must have one thread, goes on inside the holder's namespaces.

    Returns in a child of it, because a process can't change the namespace in which it counts. What called stays
    outside, hands signals on, and ends as the child ends; the child dies with it.

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
    # What comes before there is a child to hand it on to must wait.
    signal.pthread_sigmask(signal.SIG_BLOCK, _HANDED_ON)
    child = os.fork()
    if child == 0:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDED_ON)
        return
    for number in _HANDED_ON:
        signal.signal(number, lambda number, _: os.kill(child, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDED_ON)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def main() -> None:
    """The command line."""
    enter(int(sys.argv[1]))
    command = sys.argv[2:]
    try:
        os.execvp(command[0], command)
    except OSError as error:
        # As shells say it.
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(127)


if __name__ == "__main__":
    main()
