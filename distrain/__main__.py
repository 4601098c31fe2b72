"""``distrain NAME``, ``python -m distrain NAME`` and ``torchrun … -m distrain NAME``: one command, by its name."""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # Python has put a folder in front of all others: with -m the current one, else this file's. Modules in it must not
    # take the place of distrain's and torch's. A user's own module is still found: the current folder is appended when
    # one is named.
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]
    # This package, and not another one of that name; also where none is installed.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import distrain  # noqa: F401

    sys.path.append(sys.path.pop(0))

from distrain.cli import dispatch
from distrain.errors import EXIT_OUTPUT_CLOSED


def main() -> None:
    """Runs the command that the command line names, and ends the process with its exit code."""
    try:
        dispatch.run(sys.argv)
        sys.stdout.flush()
    except BrokenPipeError:
        # `distrain --help | head` has read enough. Without destructors, which would write the rest.
        os._exit(EXIT_OUTPUT_CLOSED)


if __name__ == "__main__":
    main()
