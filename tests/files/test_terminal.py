"""A terminal that can't be written ends nothing."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from distrain.files.terminal import TERMINAL, print_to_stderr
from tests.harness import soaked
from tests.runs import LAUNCH


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


def test_a_line_in_a_terminal_takes_the_place_of_a_live_line_that_another_process_drew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = io.StringIO("epoch 1/2  training")
    terminal.seek(0, io.SEEK_END)
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    print_to_stderr("a line")
    assert terminal.getvalue() == "epoch 1/2  training\r\x1b[Ka line\n"


SCRIPT = """
import os, sys
from distrain.files.terminal import open_standard_streams, print_to_stderr
open_standard_streams()
with open(sys.argv[1], "w") as file:
    assert file.fileno() > 2
    os.write(1, b"printed by a library")
    os.write(2, b"printed by a library")
    print_to_stderr("a line")
    file.write("the data")
    file.flush()
    os.system("echo a child also prints; echo that >&2")
"""


@pytest.mark.parametrize("closed", ["0<&-", ">&-", "2>&-", ">&- 2>&-", "0<&- 2>&-", "0<&- >&-", "0<&- >&- 2>&-"])
def test_no_file_takes_the_place_of_a_closed_stream(closed: str, tmp_path: Path) -> None:
    subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" "$2" {closed}', sys.executable, SCRIPT, str(tmp_path / "file")],
        env={**os.environ, "PYTHONPATH": str(LAUNCH.parent)},
        capture_output=True,
        check=True,
    )
    assert (tmp_path / "file").read_text() == "the data"


#: Where a training's output goes. Streams of the second kind are also tried within this process above.
OUTPUTS = (">&- 2>&-", ">/dev/full 2>/dev/full", "2>&1 | true")


@pytest.mark.parametrize("to", soaked(OUTPUTS, OUTPUTS[::2]))
def test_a_training_whose_output_nobody_takes_writes_its_log(to: str, tmp_path: Path) -> None:
    options = "data=synthetic data.height=8 data.width=8 data.train_size=40 data.test_size=8 data.batch_size=8"
    line = f'{{ "$0" "$1" {options} trainer.epochs=1 run_dir=run logger=none; echo $? > code; }} {to}'
    subprocess.run(
        ["sh", "-c", line, sys.executable, str(LAUNCH / "train.py")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(LAUNCH.parent), "OMP_NUM_THREADS": "1"},
        check=True,
    )
    assert (tmp_path / "code").read_text() == "0\n"
    log = (tmp_path / "run" / "logs" / "rank_0.log").read_text()
    assert "epoch 1/1" in log
    assert "test_accuracy" in log
    assert (tmp_path / "run" / "summary.json").exists()
