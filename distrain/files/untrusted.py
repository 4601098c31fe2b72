"""Small files that may come from a stranger: plain, of bounded size, and data however they are made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def printable(text: str) -> str:
    """The text without what would steer a terminal: names in a run's folder are a stranger's."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


class Unreadable(ValueError):
    """A file isn't what it should be; the message names the file and says why, in one line."""


def read_text(path: Path, largest: int) -> str:
    """Reads a text file.

    Args:
        path: The file.
        largest: Most bytes it may have.

    Raises:
        FileNotFoundError: There is none.
        Unreadable: It is no plain file (a pipe would never end), too large, or no UTF-8.
    """
    if not path.exists():
        raise FileNotFoundError(path)
    if not path.is_file():
        raise Unreadable(f"{path.name} is no plain file")
    try:
        with path.open("rb") as file:
            content = file.read(largest + 1)
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise Unreadable(f"{path.name} can't be read ({error})") from error
    if len(content) > largest:
        raise Unreadable(f"{path.name} has more than {largest} bytes")
    return text


def read_json(path: Path, largest: int) -> dict[str, Any]:
    """Reads a file that holds a JSON object.

    Raises:
        FileNotFoundError: There is none.
        Unreadable: As :func:`read_text`, or it is no JSON object, nested too deep, or names a key twice, of which the
            last would be believed.
    """
    text = read_text(path, largest)
    try:
        content = json.loads(text, object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"{path.name} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise Unreadable(f"{path.name} is not a mapping of keys to values")
    return content


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name stands twice")
    return dict(pairs)
