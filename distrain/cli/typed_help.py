"""Help and hints that show commands as their reader starts them: ``distrain NAME``, or ``python launch/NAME.py``."""

from __future__ import annotations

import contextlib
import io
import pkgutil
import re
import sys
from collections.abc import Iterator

from distrain.cli import commands
from distrain.config.registry import PYTHON_OBJECT
from distrain.runtime import program

_NAME = "|".join(module.name for module in pkgutil.iter_modules(commands.__path__))
_COMPLETION = re.compile(r"distrain --completion (\w+)")
_MODULE = re.compile(rf"-m distrain ({_NAME})\b")
_COMMAND = re.compile(rf"\bdistrain ({_NAME})\b")
#: A line of a table: what to type, and in a column of its own what it does.
_ROW = re.compile(r"(?P<typed>.*\S)(?P<gap> {3,})(?P<remark>\S.*)")


def as_started(text: str) -> str:
    """Replaces ``distrain NAME`` by what starts the script of that command, if a script was started.

    Args:
        text: Help text. Remarks behind three or more blanks stay in their column where they can.
    """
    if program.is_dispatched():
        return text
    return "\n".join(map(_as_started, text.split("\n")))


@contextlib.contextmanager
def printed_as_started() -> Iterator[None]:
    """Does the same with all that is printed in this context, and leaves out the choice that no command can choose."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        # Hydra lists every file of a group.
        text = printed.getvalue().replace(f"{PYTHON_OBJECT}, ", "").replace(f", {PYTHON_OBJECT}", "")
        sys.stdout.write(as_started(text))


def _as_started(line: str) -> str:
    row = _ROW.fullmatch(line)
    if row is None:
        return _with_scripts(line)
    typed = _with_scripts(row["typed"])
    return typed.ljust(max(row.start("remark"), len(typed) + 2)) + row["remark"]


def _with_scripts(text: str) -> str:
    text = _COMPLETION.sub(lambda found: f"python {program.script('train')} -sc install={found[1]}", text)
    text = _MODULE.sub(lambda found: program.script(found[1]), text)
    return _COMMAND.sub(lambda found: f"python {program.script(found[1])}", text)
