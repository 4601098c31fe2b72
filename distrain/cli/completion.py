"""Completion of ``distrain …`` by the Tab key in bash, zsh and fish.

The shell's function hands the line up to the cursor to ``distrain --complete``, which prints one candidate per line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from distrain.config.registry import GROUPS, selectable
from distrain.errors import ConfigError

#: What a user's shell is to run once, for each shell.
SCRIPTS = {
    "bash": r"""_distrain_complete() {
    local line=${COMP_LINE:0:COMP_POINT} candidate before=
    local word=${line##*[[:space:]]}
    # Where = separates words, bash replaces only what follows it.
    if [[ $word == *=* && $COMP_WORDBREAKS == *=* ]]; then before=${word%"${word##*=}"}; fi
    COMPREPLY=()
    while IFS= read -r candidate; do
        # No blank behind what goes on.
        case $candidate in *[=./]) ;; *) candidate+=' ' ;; esac
        COMPREPLY+=("${candidate#"$before"}")
    done < <(distrain --complete "$line" 2>/dev/null)
}
complete -o nospace -F _distrain_complete distrain
""",
    "zsh": r"""if (( ! $+functions[compdef] )); then autoload -Uz compinit && compinit; fi
_distrain_complete() {
    local line="${(j: :)words[1,CURRENT-1]} $PREFIX" candidate
    for candidate in ${(f)"$(distrain --complete "$line" 2>/dev/null)"}; do
        # No blank behind what goes on.
        case $candidate in
            *[=./]) compadd -Q -S '' -- $candidate ;;
            *) compadd -Q -- $candidate ;;
        esac
    done
}
compdef _distrain_complete distrain
""",
    "fish": r"""function __distrain_complete
    distrain --complete (commandline -cp) 2>/dev/null
end
complete -c distrain -f -a '(__distrain_complete)'
""",
}
#: Options of every command that are worth a Tab.
_OPTIONS = ("--help", "--config-dir", "--cfg", "--multirun")
#: Commands that start their own ranks with ``nproc=N``.
_START_RANKS = ("train", "evaluate", "predict", "verify", "plan", "find", "doctor")
#: Commands whose settings behind ``--`` are those of a training.
_OF_TRAININGS = ("hosts", "chaos", "verify", "plan", "find")
#: Commands that take folders of runs without a key.
_TAKE_FOLDERS = ("compare", "watch")
#: Hydra offers the places of a list as if they were keys.
_LIST_ELEMENT = re.compile(r"=\d+[=.]$")


def script(shell: str) -> str:
    """The lines that switch completion on in a shell.

    Raises:
        ConfigError: There is no completion for this shell.
    """
    if shell not in SCRIPTS:
        raise ConfigError("--completion", shell, "there is none for this shell", SCRIPTS)
    return SCRIPTS[shell]


def print_candidates(line: str, commands: Sequence[str]) -> None:
    """Prints what can stand at the end of a line, one candidate per line.

    Args:
        line: What was typed up to the cursor, from ``distrain`` on.
        commands: The names of all commands.
    """
    words = [*line.split(), ""] if line[-1:].isspace() else line.split()
    word, before = words[-1], words[1:-1]
    if not before:
        _print([*commands, "--help", "--version", "--completion"], word)
    elif before == ["--completion"]:
        _print(SCRIPTS, word)
    elif before[0] in commands and before[-1] not in ("--config-dir", "-cd"):
        _print_settings(before[0], before[1:], word)
    else:
        _print(_paths(word), word)


def _print_settings(name: str, before: Sequence[str], word: str) -> None:
    is_of_training = "--" in before
    if is_of_training:
        if name not in _OF_TRAININGS:
            return
        name, before = "train", before[len(before) - before[::-1].index("--") :]
    key, equals, value = word.partition("=")
    found: list[str] = []
    if word.startswith("-"):
        found += _OPTIONS
    elif not value.startswith(("~", ".", "/")):
        if name == "sweep":
            from distrain.cli.sweep import SweepSettings

            found += ["nproc=", "sweep.folder="]
            found += [f"sweep.{field.name}=" for field in dataclasses.fields(SweepSettings) if field.name != "nproc"]
        elif name in _START_RANKS and not is_of_training:
            from distrain.tools.launching.launch_keys import LaunchSettings

            found += [f"{field.name}=" for field in dataclasses.fields(LaunchSettings)]
        elif name in _TAKE_FOLDERS:
            # Runs are named without a key.
            before = [typed for typed in before if "=" in typed]
            found += [] if equals else [path for path in _paths(word) if path.endswith("/")]
        found += _asked_of_hydra(name, before, word)
    found = [candidate for candidate in found if candidate.startswith(word) and candidate != word]
    if equals and not found:
        found = [f"{key}={path}" for path in _paths(value)]
    _print(found, word)


def _asked_of_hydra(name: str, before: Sequence[str], word: str) -> list[str]:
    """The keys and choices that Hydra offers for the last word of a command's settings."""
    name = "train" if name == "sweep" else name
    # Hydra takes the first word for the program. It looks for choices where its own arguments say, not the line's.
    os.environ["COMP_LINE"] = " ".join([name, *before, word])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        importlib.import_module(f"distrain.cli.commands.{name}").main([*_config_dir(before), "-sc", "query=fish"])
    lines = printed.getvalue().splitlines()
    offered = [
        candidate
        for candidate in lines
        if candidate and not _LIST_ELEMENT.search(candidate) and selectable([candidate.partition("=")[2]])
    ]
    if name == "train":
        return offered
    # conf/ is the folder of all commands, and its groups are those of trainings.
    return [candidate for candidate in offered if candidate.rstrip("=/.") not in {*GROUPS, "experiment", "hydra"}]


def _config_dir(words: Sequence[str]) -> list[str]:
    """``--config-dir`` and its value, as they stand among the words."""
    for place, word in enumerate(words):
        if word in ("--config-dir", "-cd"):
            return list(words[place : place + 2])
        if word.startswith("--config-dir="):
            return [word]
    return []


def _paths(start: str) -> list[str]:
    """The files and folders whose path begins with this text; a folder's ends with a slash."""
    name = start.rpartition("/")[2]
    parent = start.removesuffix(name)
    folder = Path(parent or ".").expanduser()
    if not folder.is_dir():
        return []
    found = [path for path in sorted(folder.iterdir()) if path.name.startswith(name)]
    visible = [path for path in found if name or not path.name.startswith(".")]
    return [f"{parent}{path.name}{'/' if path.is_dir() else ''}" for path in visible]


def _print(candidates: Iterable[str], word: str) -> None:
    for candidate in candidates:
        if candidate.startswith(word):
            print(candidate)
