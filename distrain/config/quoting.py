"""Text as Hydra's command line reads it back: quoted where it would take the text for something else."""

from __future__ import annotations

import re

#: A path of which Hydra reads no part as a number, a list or anything else that has a meaning.
_PLAIN_PATH = re.compile(r"[\w./-]*/[\w./-]*[A-Za-z_/.-]", re.ASCII)


def in_quotes(text: str) -> str:
    """Text as a quoted value of Hydra's grammar."""
    # Backslashes count only before a quote, so at the end too.
    escaped = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + ("\\" + found[2] if found[2] else ""), text)
    return f'"{escaped}"'


def path_setting(key: str, path: str) -> str:
    """The argument that gives a key this path, with quotes only if it needs them."""
    return f"{key}={path if _PLAIN_PATH.fullmatch(path) else in_quotes(path)}"
