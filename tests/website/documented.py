"""The commands that the documentation shows: where they stand, and what each of them starts.

A command is what stands in a block of ``bash``, and inline code that begins with a program's name. A comment in front
of a block, table or paragraph says why its commands are not run (they are composed all the same)::

    <!-- not run: needs SLURM -->
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.runs import LAUNCH

ROOT = LAUNCH.parent
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))

_NOT_RUN = re.compile(r"\s*<!-- not run: (?P<reason>.+) -->")
_FENCE = re.compile(r"(?P<indent> *)```(?P<language>\w*)")
_INLINE = re.compile(r"`([^`]+)`")
#: Inline code that begins with one of these is a command.
_PROGRAMS = ("distrain", "torchrun", "python", "pip", "make", "sbatch", "docker", "kubectl", "tensorboard")
#: First lines of blocks that are files, as in ``# my_package.py``; a line that Hydra wants to be the first may precede.
_FILE = re.compile(r"(# @package .*\n)?# (?P<path>[\w./-]+\.(py|yaml))$", re.MULTILINE)
#: Words of the shell's own grammar in front of a command.
_KEYWORDS = {"do", "then", "!"}
#: Shell commands that start nothing else, and what is written behind them is not looked at.
_SHELL = {"for", "done", "wait", "export", "cd", "source", "test", ".", "exit", "mkdir", "fi"}


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        page: The page, below the repository.
        line: Number of its first line.
        language: What stands behind the three backquotes.
        text: Its lines, without the indentation of the block.
        not_run: Why its commands are not run; empty if they are.
    """

    page: str
    line: int
    language: str
    text: str
    not_run: str

    @property
    def file(self) -> str | None:
        """The path of the file that the block is, if its first line says so."""
        first = _FILE.match(self.text)
        return first["path"] if first else None


@dataclass(frozen=True)
class Inline:
    """Code within a line of text."""

    page: str
    line: int
    text: str
    not_run: str

    @property
    def is_command(self) -> bool:
        """Whether a user could type it."""
        return self.text.split()[0] in _PROGRAMS and " " in self.text


def read(path: Path) -> tuple[list[Block], list[Inline]]:
    """All code of a page."""
    page = path.relative_to(ROOT).as_posix()
    blocks: list[Block] = []
    inline: list[Inline] = []
    lines = iter(enumerate(path.read_text().splitlines(), 1))
    reason = ""
    for number, line in lines:
        fence = _FENCE.match(line)
        mark = _NOT_RUN.fullmatch(line)
        if mark:
            reason = mark["reason"]
        elif fence:
            body = []
            for _, inner in lines:
                if inner.strip() == "```":
                    break
                body.append(inner.removeprefix(fence["indent"]))
            blocks.append(Block(page, number, fence["language"], "\n".join(body), reason))
            reason = ""
        elif not line.strip():
            reason = ""
        else:
            inline += [Inline(page, number, code.replace("\\|", "|"), reason) for code in _INLINE.findall(line)]
    return blocks, inline


def simple_commands(text: str) -> Iterator[list[str]]:
    """The programs that a piece of shell starts, each with its arguments.

    Assignments in front of a program, the shell's keywords, redirections, and ``…``, which stands for anything, are
    left out.

    Raises:
        ValueError: A quote is open.
    """
    for line in text.replace("\\\n", " ").splitlines():
        for inner in re.findall(r"\$\(([^()]*)\)", line):
            yield from simple_commands(inner)
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        words: list[str] = []
        for token in [*lexer, ";"]:
            if set(token) <= set(";&|"):
                yield from _program(words)
                words = []
            else:
                words.append(token)


def _program(words: list[str]) -> Iterator[list[str]]:
    words = [word for word in words if word not in ("…", "...")]
    while words and (words[0] in _KEYWORDS or re.match(r"[A-Za-z_]\w*=", words[0])):
        del words[0]
    if words and words[0] == "eval":
        # Its $(…) has been looked at.
        return
    if words and words[0] not in _SHELL:
        yield words


def write_files(blocks: Iterable[Block], folder: Path) -> None:
    """Writes the blocks that are files, as a reader would."""
    for block in blocks:
        if block.file:
            file = folder / block.file
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text + "\n")
