"""What a user typed to start this command, and what starts a command of distrain from anywhere.

A command is started as ``distrain NAME``, as ``python -m distrain NAME`` (``torchrun … -m distrain NAME`` on several
ranks), or by its script in a checkout, ``python launch/NAME.py``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

#: ``python MAIN NAME`` is ``distrain NAME``. Unlike ``-m distrain`` it works where distrain is not installed, and never
#: takes a folder called distrain in the current folder for distrain.
MAIN = Path(__file__).resolve().parents[1] / "__main__.py"

#: The command's name if ``distrain NAME`` was typed in one of its forms; ``None`` if a script was started.
_name: str | None = None
#: The function that a Python program has called, such as ``distrain.fit``; ``None``: this is a command.
function: str | None = None
_removed: list[str] = []


def remember(name: str) -> None:
    """Says that this process is ``distrain NAME``, and not a script; ``sys.argv`` no longer holds the name."""
    global _name
    _name = name


@contextlib.contextmanager
def called_as(name: str) -> Iterator[None]:
    """Inside this block messages speak of a function that a Python program has called, not of a command line."""
    global function
    before, function = function, name
    try:
        yield
    finally:
        function = before


def is_dispatched() -> bool:
    """Whether ``distrain NAME`` was typed in one of its forms, and not a script started."""
    return _name is not None


def script(name: str) -> str:
    """The script of a command, as it would be typed beside the script that was started."""
    return str(Path(sys.argv[0]).with_name(f"{name}.py"))


def remember_removed(arguments: Sequence[str]) -> None:
    """Says that these arguments were removed from ``sys.argv``: keys that are no part of a run's configuration."""
    _removed[:] = arguments


def removed() -> list[str]:
    """What :func:`remember_removed` was told."""
    return list(_removed)


def starting(name: str) -> list[str]:
    """What Python or torchrun must be given in front of the settings, to start a command from any folder."""
    return [str(MAIN), name]


def on_one_rank(script: str) -> list[str]:
    """The words that a user types in front of the settings to start this command on one rank.

    Args:
        script: ``sys.argv[0]``.
    """
    if _name is None or Path(script).name == MAIN.name:
        return ["python", *under_torchrun(script)]
    return [*short([script]), _name]


def under_torchrun(script: str) -> list[str]:
    """The words that a user types behind torchrun's options and in front of the settings, to start this command.

    Args:
        script: ``sys.argv[0]``.
    """
    return [script] if _name is None else [*short([str(MAIN)]), _name]


def short(words: Sequence[str]) -> list[str]:
    """The words that start a program, as a user types them.

    Args:
        words: The words with their paths as the system knows them. ``/venv/bin/python /venv/bin/distrain`` becomes
            ``distrain`` if that is what the shell finds, and :data:`MAIN` becomes ``-m distrain`` where that works.
    """
    words = list(words)
    for place, word in enumerate(words[:2]):
        name = Path(word).name
        if name in ("distrain", "torchrun"):
            found = shutil.which(name)
            same = found is not None and os.path.realpath(found) == os.path.realpath(word)
            words[: place + 1] = [name if same else word]
            break
    if words[-1:] == [str(MAIN)] and _is_installed():
        words[-1:] = ["-m", "distrain"]
    return words


def _is_installed() -> bool:
    """Whether this interpreter finds distrain from any folder: its environment has the command."""
    return shutil.which("distrain", path=str(Path(sys.executable).parent)) is not None
