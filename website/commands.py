"""Makes the page of commands from what each of them says about itself."""

from __future__ import annotations

import subprocess
import sys

from distrain.cli.dispatch import COMMANDS


def page() -> str:
    """The page's Markdown: one line for each command, then what its ``--help`` prints."""
    lines = ["# Commands", "", "`distrain COMMAND --help` prints what is below.", ""]
    lines += ["| command | what it does |", "| --- | --- |"]
    lines += [f"| [`distrain {name}`](#{name}) | {purpose} |" for name, purpose in COMMANDS.items()]
    for name in COMMANDS:
        lines += ["", f"## {name} {{ #{name} }}", "", "```text", _help(name), "```"]
    return "\n".join(lines) + "\n"


def _help(name: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "distrain", name, "--help"], capture_output=True, text=True, check=True
    ).stdout.strip()
