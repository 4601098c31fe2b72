"""Text in a terminal: its width, and lines that replace those before."""

from __future__ import annotations

import io

import pytest

from distrain.files import live_text
from distrain.files.live_text import LiveText, bar, clock, cut, display_width, is_live


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_letters_of_east_asia_take_two_columns_and_accents_none() -> None:
    assert [display_width(text) for text in ("ab", "数据", "e\u0301", "…–")] == [2, 4, 1, 2]


def test_text_is_cut_by_columns_and_not_by_letters() -> None:
    assert [cut("数据数据", width) for width in (8, 7, 4, 1)] == ["数据数据", "数据数…", "数…", "…"]
    assert cut("abc", 3) == "abc"


def test_bars_and_durations() -> None:
    assert [bar(share, 4) for share in (0.0, 0.5, 1.0, 7.0)] == ["░░░░", "██░░", "████", "████"]
    assert [clock(seconds) for seconds in (0, 9.9, 75, 3723)] == ["0:00", "0:09", "1:15", "1:02:03"]


def test_lines_replace_those_before_and_a_narrower_terminal_is_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    size = [80, 24]
    monkeypatch.setattr(live_text, "terminal_size", lambda: size)
    stream = io.StringIO()
    live = LiveText(stream)
    live.show(["a", "b"])
    live.show(["c"])
    assert stream.getvalue() == "a\nb\n\x1b[2A\r\x1b[Jc\n"
    size[0] = 40
    live.show(["d"])
    assert stream.getvalue().endswith("\x1b[H\x1b[2Jd\n")


def test_only_terminals_that_can_draw_are_live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    closed = io.StringIO()
    closed.close()
    assert [is_live(stream) for stream in (Terminal(), io.StringIO(), closed, object())] == [True] + 3 * [False]  # type: ignore[arg-type]
    monkeypatch.setenv("TERM", "dumb")
    assert not is_live(Terminal())
