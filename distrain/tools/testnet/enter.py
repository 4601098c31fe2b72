"""Runs a command inside the namespaces of another process: ``python enter.py PID COMMAND...``.

Unlike util-linux's ``nsenter``, this forwards signals to the command, ends with the command's exit status, and kills
the command when it is killed itself.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

#: The mount namespace comes last, because afterwards ``/proc`` shows the holder's processes only.
_NAMESPACES = ("pid_for_children", "net", "uts", "mnt")
_PR_SET_PDEATHSIG = 1
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def enter_namespaces(holder: int) -> None:
    """Forks a child inside the holder's namespaces; returns in the child only.

    A fork is needed because a process can't change its own PID namespace. The calling process, which must have a single
    thread, never returns: it forwards signals to the child and ends with the child's exit status. The child is killed
    if the caller dies.

    Args:
        holder: Number of a process that has network, host name, mount and PID namespaces of its own.

    Raises:
        OSError: The holder has ended, or the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    folder = Path.cwd()
    descriptors = [os.open(f"/proc/{holder}/ns/{space}", os.O_RDONLY) for space in _NAMESPACES]
    for space, descriptor in zip(_NAMESPACES, descriptors, strict=True):
        if libc.setns(descriptor, 0):
            number = ctypes.get_errno()
            raise OSError(number, f"can't enter namespace {space} of process {holder}: {os.strerror(number)}")
        os.close(descriptor)
    # Entering a mount namespace changes the working directory to its root.
    os.chdir(folder)
    # Signals stay pending until there is a child to forward them to.
    signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    child = os.fork()
    if child == 0:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
        return
    for number in _FORWARDED:
        signal.signal(number, lambda number, _: os.kill(child, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def main() -> None:
    """The command line."""
    enter_namespaces(int(sys.argv[1]))
    command = sys.argv[2:]
    try:
        os.execvp(command[0], command)
    except OSError as error:
        # The message and exit code of shells.
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(127)


if __name__ == "__main__":
    main()
