"""The line that says why a process ends: printed, and left in a file for the launcher that started the process.

torch's agent gives each of its ranks the name of a file in ``TORCHELASTIC_ERROR_FILE``. torchrun prints what a rank
wrote there at the very end of its own output, below "Root Cause". distrain's launcher prints this line and nothing
else, so its ranks don't print it themselves.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from distrain.files.escaping import escaped
from distrain.files.terminal import print_to_stderr

#: Environment variable with the process ID of distrain's launcher, in the ranks that it starts.
LAUNCHER = "DISTRAIN_LAUNCHER"
#: Environment variable with the name of the file for torch's agent.
_FILE = "TORCHELASTIC_ERROR_FILE"
#: Key of the line that distrain's launcher prints; empty if there is nothing left to say.
_LINE = "distrain_line"


def print_last_line(line: str, *, cause: str | None = None) -> None:
    """Prints why this process ends, unless its launcher will; tells the launcher.

    Args:
        line: The line, in which this process speaks for itself.
        cause: What the launcher says, where it speaks for all ranks; ``None``: the line.
    """
    told = _tell(line, cause if cause is not None else line)
    if not (told and is_launcher_ours()):
        print_to_stderr(line)


def tell_launcher(line: str) -> None:
    """Tells the launcher why this process ends, when the user has been told already."""
    _tell(line, "")


def is_launcher_ours() -> bool:
    """Whether distrain's own launcher started this process and still runs."""
    return os.environ.get(LAUNCHER) == str(os.getppid())


def told_line(message: Any) -> str | None:
    """The line that a rank left for its launcher.

    Args:
        message: The entry ``message`` of the file, as torch's agent reads it.

    Returns:
        The line; empty if the user has been told already; ``None`` if the rank left nothing.
    """
    extra = message.get("extraInfo") if isinstance(message, dict) else None
    line = extra.get(_LINE) if isinstance(extra, dict) else None
    return line if isinstance(line, str) else None


def _tell(line: str, launcher_line: str) -> bool:
    """Writes the file, once: what comes later is a consequence. Returns whether there is such a file."""
    name = os.environ.get(_FILE)
    if not name:
        return False
    # What torch's agent reads. It fails if the file is not complete, and needs the time as text.
    content = {
        "message": {
            "message": escaped(line),
            "extraInfo": {"timestamp": str(int(time.time())), _LINE: escaped(launcher_line)},
        }
    }
    path, part = Path(name), Path(f"{name}.{os.getpid()}")
    if path.exists():
        return True
    try:
        part.write_text(json.dumps(content))
        part.replace(path)
    except OSError:
        # The launcher's folder may have been removed, or its disk is full: this process prints the line itself.
        return False
    return True
