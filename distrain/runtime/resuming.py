"""What to type so that a run which was stopped goes on."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from distrain.config.quoting import path_setting
from distrain.runtime import program

_RUN_DIR = re.compile(r"\+{0,2}run_dir=")
#: Would start the run anew, or from another run's checkpoint, instead of going on.
_RESUME = re.compile(r"\+{0,2}resume=")
_SEVERAL_RUNS = {"-m", "--multirun"}


def how_to_resume(
    run_dir: Path, own: Sequence[str], parent: Sequence[str], arguments: int, environment: Mapping[str, str]
) -> str:
    """What a user must do, for the line that says that a run has stopped.

    Args:
        run_dir: The run's folder.
        own: The command line of this process, ``sys.orig_argv``.
        parent: That of the process that started it; empty if it is unknown. Only torchrun's is used.
        arguments: The number of words of both that are the script and its arguments, ``len(sys.argv)``.
        environment: The environment variables, which say how the ranks were started.
    """
    folder = os.path.relpath(run_dir)
    if program.function is not None:
        shown = str(run_dir) if folder.startswith("..") else folder
        return f"to go on: {program.function}(…, run_dir={shown!r})"
    script, *settings = own[-arguments:]
    place = path_setting("run_dir", str(run_dir) if folder.startswith("..") else folder)
    given = any(_RUN_DIR.match(setting) for setting in settings)
    if _SEVERAL_RUNS & set(settings):
        return f"to go on, start this run alone, with {shlex.quote(place)}"
    kept = [setting for setting in settings if not _RESUME.match(setting)]
    command = [script, *kept] if given else [script, *kept, place]
    if "TORCHELASTIC_RUN_ID" in environment:
        if list(parent[-arguments:]) != list(own[-arguments:]):
            return _same_again(place, given=given)
        hosts = "" if environment.get("GROUP_WORLD_SIZE", "1") == "1" else ", on every host with its own options"
        return f"to go on{hosts}: {shlex.join([*program.short(parent[:-arguments]), *command])}"
    if environment.get("WORLD_SIZE", "1") != "1":
        return _same_again(place, given=given)
    return f"to go on: {shlex.join([*program.short(own[:-arguments]), *command])}"


def command_of(process: int) -> list[str]:
    """The command line of a process; empty if it can't be read, as on systems without ``/proc``."""
    try:
        words = Path("/proc", str(process), "cmdline").read_bytes().split(b"\0")
    except OSError:
        return []
    return [os.fsdecode(word) for word in words[:-1]]


def own_command() -> tuple[list[str], int]:
    """This process's command line, and how many of its words are the script and its arguments."""
    return sys.orig_argv, len(sys.argv) + len(program.removed())


def _same_again(place: str, *, given: bool) -> str:
    addition = "" if given else f" with {shlex.quote(place)}"
    return f"to go on, start all ranks as before{addition}"
