"""What a stranger's file says reaches terminal and log as text only: it sends no commands and forges no lines."""

from __future__ import annotations

import ast
import io
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import distrain
from distrain.cli import hydra_entry
from distrain.errors import ConfigError
from distrain.files.escaping import EscapingFormatter, Lines, escaped, format_error
from distrain.files.terminal import escape_everything, print_to_stderr, show
from distrain.runtime.rank_logging import RankLogging

HOSTILE = {
    "colour": ("\x1b[31mred", "\\x1b[31mred"),
    "title": ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
    "8-bit command": ("\x9b2J", "\\x9b2J"),
    "line": ("a\nb", "a\\nb"),
    "forged record": ("x\n2026-01-01 INFO distrain: all is well", "x\\n2026-01-01 INFO distrain: all is well"),
    "overwritten": ("harmful\rharmless", "harmful\\rharmless"),
    "both ends": ("a\r\nb", "a\\r\\nb"),
    "backspace": ("rm\b\bls", "rm\\x08\\x08ls"),
    "bell": ("\a", "\\x07"),
    "delete": ("\x7f", "\\x7f"),
    "null": ("a\0b", "a\\x00b"),
    "tabulators": ("\t\v\f", "\\t\\x0b\\x0c"),
    "right to left": ("\u202egnp.exe", "\\u202egnp.exe"),
    "isolate": ("\u2066a\u2069", "\\u2066a\\u2069"),
    "line separator": ("a\u2028b\u2029c\x85d", "a\\u2028b\\u2029c\\x85d"),
    "file separators": ("\x1c\x1d\x1e", "\\x1c\\x1d\\x1e"),
    "invisible": ("a\u200bb\ufeff\u00ad", "a\\u200bb\\ufeff\\xad"),
    "tag": ("\U000e0041", "\\U000e0041"),
    "undecodable file name": ("\udcff.jpg", "\\udcff.jpg"),
    "no character": ("\uffff\ue000", "\\uffff\\ue000"),
}
HARMLESS = ("café", "猫和狗", "Ωμέγα → ∞", "🙂", "\u0645\u06cc\u200c\u062e", "全角\u3000空白", "a b", "100 %s {x} \\n")


@pytest.fixture
def run_log(tmp_path: Path) -> Iterator[Callable[[], str]]:
    """A run's log, whose file a test reads."""
    logs = RankLogging()
    logs.start(0)
    logs.add_file(tmp_path, 0)
    yield lambda: (tmp_path / "logs" / "rank_0.log").read_text(encoding="utf-8")
    logs.stop()


@pytest.mark.parametrize(("text", "shown"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_takes_one_line_in_every_channel(
    text: str, shown: str, run_log: Callable[[], str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert escaped(text) == shown
    channels: list[Callable[[], object]] = [
        lambda: logging.getLogger("distrain.anything").warning("class %s left out of %d", text, 3),
        lambda: logging.getLogger("distrain").warning("%(name)s", {"name": text}),
        lambda: logging.getLogger("distrain").warning(
            "%s: %.1f %r", Path("/x") / text.replace("\0", "\x01"), 0.5, [text]
        ),
        lambda: logging.getLogger("distrain").warning("%s", ValueError(text)),
        lambda: logging.getLogger("distrain").warning(ValueError(text)),
        lambda: show(text),
        lambda: print_to_stderr(text),
        lambda: show(Lines.of([text])),
        lambda: print_to_stderr(f"distrain: rank 0 failed: {text}"),
    ]
    for print_text in channels:
        print_text()
        printed = "".join(capsys.readouterr())
        assert printed.endswith("\n")
        assert printed[:-1].isprintable(), printed
    lines = run_log().split("\n")[:-1]
    assert len(lines) == 5
    assert all(line.isprintable() for line in lines)
    assert lines[0].endswith(f"WARNING distrain.anything: class {shown} left out of 3")


@pytest.mark.parametrize(("text", "shown"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_takes_one_line_in_a_refusal(text: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    del shown
    with pytest.raises(SystemExit):
        hydra_entry.exit_refused(ConfigError("run", text, f"says {text}", [text]))
    printed = capsys.readouterr().err
    assert printed.startswith("distrain: run=")
    assert printed[:-1].isprintable()


@pytest.mark.parametrize("text", HARMLESS)
def test_letters_of_all_languages_stay(
    text: str, run_log: Callable[[], str], capsys: pytest.CaptureFixture[str]
) -> None:
    logging.getLogger("distrain").warning("class %s", text)
    assert run_log().endswith(f"class {text}\n")
    assert capsys.readouterr().err == f"class {text}\n"


def test_lines_that_the_program_made_stay_and_what_they_quote_is_escaped(run_log: Callable[[], str]) -> None:
    logging.getLogger("distrain").info("a table:\n%s", Lines.of(["  one\x1b", "  two\nthree"]))
    assert run_log().split("INFO distrain: ")[1] == "a table:\n  one\\x1b\n  two\\nthree\n"


def fail(message: str) -> None:
    raise ValueError(message)


def test_a_traceback_keeps_its_lines_and_its_message_takes_one(run_log: Callable[[], str]) -> None:
    try:
        try:
            fail("first\n2026-01-01 INFO distrain: forged")
        except ValueError as error:
            raise RuntimeError("\x1b[2Jsecond\r") from error
    except RuntimeError:
        logging.getLogger("distrain").exception("failed")
    lines = run_log().split("\n")
    assert all(line.isprintable() for line in lines)
    assert "ValueError: first\\n2026-01-01 INFO distrain: forged" in lines
    assert "RuntimeError: \\x1b[2Jsecond\\r" in lines
    assert any(line.startswith('  File "') for line in lines)
    assert "The above exception was the direct cause of the following exception:" in lines


def test_an_argument_that_can_not_be_encoded_does_not_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding in ("ascii", "latin-1", "utf-8"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
        monkeypatch.setattr(sys, "stdout", stream)
        show("猫 \udc80 é")
        stream.seek(0)
        assert "\\udc80" in stream.read()


def test_a_closed_stream_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    print_to_stderr("anything")


def test_what_python_itself_prints_is_escaped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module, name in ((sys, "excepthook"), (threading, "excepthook"), (warnings, "formatwarning")):
        monkeypatch.setattr(module, name, getattr(module, name))
    assert logging.lastResort is not None
    monkeypatch.setattr(logging.lastResort, "formatter", None)
    escape_everything()
    error = ValueError("\x1b[2J\nforged")
    sys.excepthook(ValueError, error, None)
    assert capsys.readouterr().err == "ValueError: \\x1b[2J\\nforged\n"
    threading.excepthook(threading.ExceptHookArgs((ValueError, error, None, None)))
    assert capsys.readouterr().err == "Exception in thread ?:\nValueError: \\x1b[2J\\nforged\n"
    assert warnings.formatwarning("\x1b\n", UserWarning, "a.py", 3) == "a.py:3: UserWarning: \\x1b\\n\n"
    assert logging.lastResort.format(logging.makeLogRecord({"msg": "%s", "args": ("\r",)})) == "\\r"


def test_a_formatted_record_is_unchanged_for_other_handlers() -> None:
    record = logging.makeLogRecord({"msg": "%s", "args": ("a\nb",)})
    assert EscapingFormatter("%(message)s").format(record) == "a\\nb"
    assert record.getMessage() == "a\nb"
    assert format_error(ValueError("x")) == "ValueError: x"


#: Files that print in their own way, and why that can't carry what a stranger's file says.
PRINTS_BY_ITSELF = {
    "files/terminal.py": "the place where text is escaped",
    "training/callbacks.py": "numbers, and names of metrics, which are escaped",
    "cli/testnet.py": "the output of the user's command",
    "cli/doctor.py": "lines for a shell",
    "cli/hydra_entry.py": "the user's own YAML files",
    "cli/dispatch.py": "the list of commands, the version, and lines for a shell",
    "cli/completion.py": "names for a shell's Tab key; the shell escapes what it shows",
    "cli/commands/sweep.py": "the command's own help",
    "tools/testnet/relay.py": "one word for the process that started it",
    "tools/testnet/enter.py": "the user's command",
}


def test_nothing_else_prints() -> None:
    root = Path(distrain.__file__).parent
    printing = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert printing == PRINTS_BY_ITSELF.keys()
