"""Reading small files that may come from a stranger: regular files only, of bounded size, as data that runs no code."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import IO, Any

import yaml

#: Deepest accepted nesting of YAML; a run's configuration has about six levels.
_MAX_DEPTH = 32
_START_TOKENS = (
    yaml.BlockMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.FlowSequenceStartToken,
)
_END_TOKENS = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)


# Windows has neither pipes that would block nor processes that inherit files, but changes the ends of lines.
_FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


class UnreadableFile(ValueError):
    """A file does not hold what it should; the message names the file and the reason in one line."""


def open_regular(path: Path) -> IO[bytes]:
    """Opens a regular file for reading, whatever may be put in its place meanwhile.

    Raises:
        UnreadableFile: It is not a regular file: reading a pipe, say, would never end.
        OSError: It can't be opened.
    """
    # Looked at first, since opening some devices has effects, and again when it is open.
    if path.exists() and not path.is_file():
        raise UnreadableFile(f"{path.name} is not a regular file")
    descriptor = os.open(path, os.O_RDONLY | _FLAGS)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UnreadableFile(f"{path.name} is not a regular file")
    except BaseException:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def read_text(path: Path, max_bytes: int) -> str:
    """Reads a text file.

    Args:
        path: The file.
        max_bytes: Largest size that is read.

    Raises:
        FileNotFoundError: There is no such file.
        UnreadableFile: It is not a regular file (reading a pipe would never end), is too large, or is not UTF-8.
    """
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        file = open_regular(path)
    except OSError as error:
        raise UnreadableFile(f"{path.name} can't be read ({error})") from error
    return read_open(file, path.name, max_bytes)


def read_open(file: IO[bytes], name: str, max_bytes: int) -> str:
    """Reads the rest of an open text file, and closes it.

    Args:
        file: The file.
        name: Its name, for error messages.
        max_bytes: Largest size that is read.

    Raises:
        UnreadableFile: It can't be read, is too large, or is not UTF-8.
    """
    try:
        with file:
            content = file.read(max_bytes + 1)
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableFile(f"{name} can't be read ({error})") from error
    if len(content) > max_bytes:
        raise UnreadableFile(f"{name} has more than {max_bytes} bytes")
    return text


def read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    """Reads a file that holds a JSON object.

    Args:
        path: The file.
        max_bytes: Largest size that is read.

    Raises:
        FileNotFoundError: There is no such file.
        UnreadableFile: As for :func:`read_text`; or it is not a JSON object, is nested too deep, or holds a key twice,
            which JSON readers resolve differently.
    """
    return parse_json(path.name, read_text(path, max_bytes))


def parse_json(name: str, text: str) -> dict[str, Any]:
    """Parses a JSON object.

    Args:
        name: Of the file, for error messages.
        text: Its content, of bounded size.

    Raises:
        UnreadableFile: As for :func:`read_json`.
    """
    try:
        content = json.loads(text, object_pairs_hook=_reject_duplicates)
    except (ValueError, RecursionError) as error:
        raise UnreadableFile(f"{name} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise UnreadableFile(f"{name} is not a mapping of keys to values")
    return content


def read_yaml(path: Path, max_bytes: int) -> dict[Any, Any]:
    """Reads a file that holds a YAML mapping.

    Args:
        path: The file.
        max_bytes: Largest size that is read.

    Raises:
        FileNotFoundError: There is no such file.
        UnreadableFile: As for :func:`read_text` and :func:`parse_yaml`.
    """
    return parse_yaml(path.name, read_text(path, max_bytes))


def parse_yaml(name: str, text: str) -> dict[Any, Any]:
    """Parses a YAML mapping by YAML's safe loader.

    Args:
        name: Of the file, for error messages.
        text: Its content, of bounded size.

    Raises:
        UnreadableFile: It is not a YAML mapping, is nested too deep, or has aliases, with which a few lines can fill
            all memory.
    """
    try:
        _refuse_yaml_bombs(name, text)
        content = yaml.safe_load(text)
    except UnreadableFile:
        raise
    except (yaml.YAMLError, ValueError) as error:  # ValueError: for example an impossible date
        raise UnreadableFile(f"{name} is not plain YAML ({error})") from error
    if not isinstance(content, dict):
        raise UnreadableFile(f"{name} is not a mapping of keys to values")
    return content


def finite_number(value: object) -> float | None:
    """A finite number as float; ``None`` for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _refuse_yaml_bombs(name: str, text: str) -> None:
    """Refuses aliases, and nesting so deep that scanning takes too long."""
    depth = 0
    # Tokens are read lazily, so scanning stops at the first token that is refused.
    for token in yaml.scan(text):
        depth += isinstance(token, _START_TOKENS) - isinstance(token, _END_TOKENS)
        if isinstance(token, yaml.AliasToken):
            raise UnreadableFile(f"{name} has YAML aliases, which no run writes")
        if depth > _MAX_DEPTH:
            raise UnreadableFile(f"{name} is nested more than {_MAX_DEPTH} deep")


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key appears twice")
    return dict(pairs)
