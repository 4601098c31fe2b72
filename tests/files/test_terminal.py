"""A terminal that can't be written ends nothing."""

from __future__ import annotations

import errno
import io
import sys

import pytest
from tqdm import tqdm

from distrain.files.terminal import TERMINAL, print_to_stderr


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [Full(), closed(), None], ids=["full", "closed", "none"])
def test_lines_for_a_terminal_that_is_gone_are_lost(
    stream: io.StringIO | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    print_to_stderr("a line")
    tqdm.write("a line", file=TERMINAL)
    print("a line", file=TERMINAL, flush=True)


def test_lines_are_printed_to_what_standard_error_is_then(capsys: pytest.CaptureFixture[str]) -> None:
    print_to_stderr("a line")
    assert capsys.readouterr().err == "a line\n"
