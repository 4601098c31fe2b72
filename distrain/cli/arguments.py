"""What a user typed, before Hydra reads it: how a value is quoted, and values that Hydra would read as something else.

Hydra's command line has a grammar of its own: ``a,b`` are two values, ``[a]`` is a list, ``1.10`` is the number 1.1,
and ``=``, ``(`` and ``~`` may stand only in quotes. A path may contain all of them.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from distrain.config.effects import ARGUMENTS
from distrain.config.key_search import schema_fields
from distrain.config.quoting import in_quotes
from distrain.config.registry import PYTHON_OBJECT
from distrain.errors import ConfigError, config_error

#: ``key=value``, also with the + or ++ that adds a key.
_SETTING = re.compile(r"(?P<key>\+{0,2}[A-Za-z_][\w.@/:-]*)=(?P<value>.*)", re.DOTALL)
#: A setting of a mapping to which keys may be added, or of a key in it.
_OPEN = re.compile(rf"({'|'.join(map(re.escape, ARGUMENTS))})[.=]")
#: A list of loggers.
_LOGGERS = re.compile(r"logger=\[\s*(|[A-Za-z_]\w*(?:\s*,\s*[A-Za-z_]\w*)*)\s*\]")
#: A value that begins with somebody's home folder and holds nothing that Hydra's grammar gives a meaning.
_HOME = re.compile(r"~[\w.-]*(/[^'\"\[\]{},()]*)?", re.DOTALL)
#: What Hydra reads as a number or a truth value, although it is written like a name.
_NO_TEXT = re.compile(r"[+-]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(e[+-]?\d[\d_]*)?|nan|[+-]?inf|true|false", re.IGNORECASE)

#: Hydra's options whose value is the next argument.
_OPTIONS_WITH_VALUE = frozenset({"--cfg", "-c", "--info", "-i", "--package", "-p", "--config-dir", "-cd"})


def quoted(key: str, value: str) -> str:
    """The argument to type in a shell so that a key gets exactly this text."""
    return shlex.quote(f"{key}={in_quotes(value)}")


def quote_home_folders(arguments: Iterable[str]) -> list[str]:
    """Puts values such as ``~/runs/a=b`` into quotes, in which Hydra allows ``~``.

    Bash replaces ``key=~/…`` by itself, other shells don't. The schema's paths are expanded after the check.
    """
    result = []
    for argument in arguments:
        setting = _SETTING.fullmatch(argument)
        if setting is not None and _HOME.fullmatch(setting["value"]):
            argument = f"{setting['key']}={in_quotes(setting['value'])}"
        result.append(argument)
    return result


def open_mappings(arguments: Iterable[str]) -> list[str]:
    """Lets ``data.kwargs.size=3`` add a key where any may be added, for which Hydra wants ``+data.kwargs.size=3``."""
    return [f"++{argument}" if _OPEN.match(argument) else argument for argument in arguments]


def place_loggers(arguments: Iterable[str]) -> list[str]:
    """Lets ``logger=[csv,tensorboard]`` choose several files of a group, each for a place of its own.

    Hydra itself would merge the files, so that only the last name is left.
    """
    result = []
    for argument in arguments:
        chosen = _LOGGERS.fullmatch(argument)
        names = [name.strip() for name in chosen[1].split(",")] if chosen else []
        if len(names) > 1:
            result.append("logger=several")
            result += [f"+logger@logger.loggers.{name}={name}" for name in dict.fromkeys(names)]
        elif chosen:
            result.append(f"logger={names[0] or 'none'}")
        else:
            result.append(argument)
    return result


def settings_and_folders(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divides a command line into settings and options, which Hydra takes, and folders, which it doesn't.

    ``key=value`` may be a folder too, as those of a sweep's jobs.
    """
    settings: list[str] = []
    folders: list[str] = []
    # Words beside --help are keys to be explained.
    explains = bool({"-h", "--help"} & set(arguments))
    for before, argument in zip(["", *arguments], arguments, strict=False):
        key, equals, _ = argument.partition("=")
        if argument.startswith("-") or before in _OPTIONS_WITH_VALUE:
            is_folder = False
        elif equals:
            is_folder = not key.isidentifier() and Path(argument).expanduser().is_dir()
        else:
            is_folder = not explains
        (folders if is_folder else settings).append(argument)
    return settings, folders


def options_first(arguments: Sequence[str]) -> list[str]:
    """Puts options and their values, such as ``--config-dir DIR``, in front: Hydra reads none between settings."""
    parser = get_args_parser()
    parser.exit_on_error = False
    try:
        settings = parser.parse_known_intermixed_args(list(arguments))[0].overrides
    except argparse.ArgumentError:
        # Told by who checks the options.
        return list(arguments)
    options, left = [], list(settings)
    for argument in arguments:
        if left and argument == left[0]:
            del left[0]
        else:
            options.append(argument)
    return [*options, *settings]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command line, and its settings as ``overrides``; what is no option of Hydra's is left out."""
    return get_args_parser().parse_known_args(options_first(arguments))[0]


def unparsable(argument: str, arguments: Sequence[str]) -> ConfigError:
    """The error for an argument that is not in Hydra's grammar; it says what to type instead.

    Args:
        argument: The argument.
        arguments: The whole command line.
    """
    problem = "is not of the form key=value"
    setting = _SETTING.fullmatch(argument)
    if setting is None:
        place = arguments.index(argument) if argument in arguments else 0
        before = _SETTING.fullmatch(arguments[place - 1]) if place else None
        if before is not None and not argument.startswith(("-", "~", "=")):
            whole = quoted(before["key"], f"{before['value']} {argument}")
            problem += f"; if it belongs to the argument before it, type {whole}"
        return config_error(f"argument '{argument}'", problem)
    problem += ", or a bracket or quote is open"
    key, value = setting["key"], setting["value"]
    for suggestion in (_quoted_list(key, value), f"{key}={in_quotes(value)}"):
        if suggestion and _parses(suggestion):
            problem += f"; if it is text, type {shlex.quote(suggestion)}"
            break
    return config_error(f"argument '{argument}'", problem)


def refuse_misread_paths(arguments: Iterable[str], schema: Callable[[], type[Any]]) -> None:
    """Refuses a path that Hydra would read as a number, a list or a mapping, for example ``run_dir=2026_11_29``.

    Args:
        arguments: The command line.
        schema: Returns the dataclass of the command's keys; called only if a value is suspicious.

    Raises:
        ConfigError: It says how to quote the path.
    """
    for argument in arguments:
        setting = _SETTING.fullmatch(argument)
        if setting is None or not setting["value"]:
            continue
        key, value = setting["key"].lstrip("+"), setting["value"]
        misread = (value.startswith(("[", "{")) or _NO_TEXT.fullmatch(value)) and not value.isdecimal()
        if misread and key in path_keys(schema()):
            raise ConfigError(key, value, f"would not be read as text; type {quoted(key, value)}")


def refuse_python_objects(arguments: Iterable[str]) -> None:
    """Refuses the choice that stands for an object of a Python program, such as ``model=python_object``.

    Raises:
        ConfigError: It names the function that takes the object.
    """
    for argument in arguments:
        setting = _SETTING.fullmatch(argument)
        # Several values in a row are those of a sweep.
        if setting is None or PYTHON_OBJECT not in setting["value"].replace(" ", "").strip("'\"").split(","):
            continue
        key = setting["key"].lstrip("+")
        if key.removesuffix(".name") in ("model", "data"):
            problem = "stands for an object in a Python program; there, give it to distrain.fit(model, data)"
            raise ConfigError(key, PYTHON_OBJECT, problem)


def path_keys(schema: type[Any]) -> list[str]:
    """The keys of a schema that hold one path."""
    return [name for name, spec in schema_fields(schema) if spec.metadata.get("path") and spec.type != "Any"]


def _quoted_list(key: str, value: str) -> str:
    """The list with quotes around each of its elements; empty for anything else."""
    if not (value.startswith("[") and value.endswith("]")):
        return ""
    return f"{key}=[{','.join(in_quotes(element.strip()) for element in value[1:-1].split(','))}]"


def _parses(argument: str) -> bool:
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return False
    return True
