"""The launcher with ranks that are small programs: exit codes, the last line, restarts, signals."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distrain.tools.launching import elastic
from distrain.tools.launching.launch_keys import LaunchSettings
from distrain.tools.launching.outcome import Outcome
from tests.harness import HANG_SECONDS

#: Names used by the ranks' programs.
RANK = "import os, sys, time; from pathlib import Path; rank = os.environ['RANK']; "
#: Starts two ranks that run the program given on its command line, and ends as they end.
LAUNCHER = """
import sys
from distrain.tools.launching import elastic
from distrain.tools.launching.launch_keys import LaunchSettings

sys.exit(elastic.run_ranks(LaunchSettings(nproc=2), sys.executable, ["-c", sys.argv[1]]).code)
"""


def launched(program: str, nproc: int = 2, max_restarts: int = 0) -> Outcome:
    settings = LaunchSettings(nproc=nproc, max_restarts=max_restarts)
    return elastic.run_ranks(settings, sys.executable, ["-c", RANK + program])


def test_ranks_know_their_place_and_get_their_arguments_unchanged(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_USE_AGENT_STORE")
    program = f"print(*(os.environ[name] for name in {names}), os.environ.get('OMP_NUM_THREADS'), '$$ ${{local_rank}}')"
    assert launched(program).code == 0
    assert sorted(capfd.readouterr().out.splitlines()) == [
        "0 2 2 127.0.0.1 True None $$ ${local_rank}",
        "1 2 2 127.0.0.1 True None $$ ${local_rank}",
    ]


@pytest.mark.parametrize(
    ("program", "code", "line"),
    [
        ("time.sleep(600) if rank == '0' else os.kill(os.getpid(), 9)", 137, "distrain: rank 1 was ended by SIGKILL"),
        ("sys.exit(3)", 3, "distrain: rank 0 ended with exit code 3"),
    ],
)
def test_a_failure_is_one_line_and_an_exit_code(
    program: str, code: int, line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    outcome = launched(program)
    printed = capfd.readouterr()
    assert outcome.code == code
    assert printed.err.startswith(line)
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize(("code", "starts"), [(1, 3), (2, 1), (75, 1)])
def test_only_a_failure_is_worth_another_start(
    code: int, starts: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program = f"open({str(tmp_path / 'starts')!r}, 'a').write('x'); sys.exit({code})"
    assert launched(program, nproc=1, max_restarts=2).code == code
    assert (tmp_path / "starts").read_text() == "x" * starts
    assert capfd.readouterr().err.count("of at most 2") == starts - 1


def test_a_restart_that_succeeds_is_a_success() -> None:
    assert launched("sys.exit(int(os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'))", max_restarts=1).code == 0


@pytest.mark.skipif(sys.platform == "win32", reason="has no such signals")
@pytest.mark.parametrize("numbers", [["SIGINT"], ["SIGTERM"], ["SIGUSR1"], ["SIGINT", "SIGINT", "SIGINT"]])
def test_ranks_get_signals_and_their_end_is_the_commands(numbers: list[str], tmp_path: Path) -> None:
    # The second one means that the user does not want to wait.
    waits = "signal.sigwait({signal.SIGTERM}); Path('2' + rank).touch(); time.sleep(600)" if numbers[1:] else "pass"
    program = (
        "import signal; Path(rank).touch(); "
        "got = signal.sigwait({signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}); Path('got' + rank).touch(); "
        f"{waits}; "
        "sys.exit(75 + got)"
    )
    mask = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {2, 10, 15}); "
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, RANK + mask + program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        for number, files in zip(numbers, (["0", "1"], ["got0", "got1"], ["20", "21"]), strict=False):
            _wait_for(tmp_path, files)
            # Less than this is the echo of the same key stroke.
            time.sleep(0.4)
            process.send_signal(getattr(signal, number))
        # Ranks that had to be killed could not say how they ended.
        assert process.wait(HANG_SECONDS) == (128 if numbers[1:] else 75) + getattr(signal, numbers[0])
    finally:
        process.kill()


def _wait_for(folder: Path, files: list[str]) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not all((folder / name).exists() for name in files):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_host_serves_the_store_if_it_can() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert not elastic._can_listen(f"127.0.0.1:{taken.getsockname()[1]}")
        port = taken.getsockname()[1]
    assert elastic._can_listen(f"localhost:{port}")
    # An address for documentation, which no host has.
    assert not elastic._can_listen(f"192.0.2.1:{port}")
    assert not elastic._can_listen(f"no-such-host.invalid:{port}")


def rank_squared() -> int:
    """What ranks run that are a function."""
    return int(os.environ["RANK"]) ** 2


def test_a_function_returns_its_values() -> None:
    assert elastic.run_ranks(LaunchSettings(nproc=3), rank_squared, ()).values == {0: 0, 1: 1, 2: 4}


def test_an_agent_that_ends_without_a_word_is_a_failure_with_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def end(_: object) -> Outcome:
        raise SystemExit(1)

    monkeypatch.setattr(elastic._Launch, "_result", end)
    outcome = elastic.run_ranks(LaunchSettings(nproc=2), sys.executable, ["-c", "pass"])
    assert (outcome.code, outcome.line) == (1, "distrain: the ranks can't be started (SystemExit: 1)")
    assert capsys.readouterr().err == f"{outcome.line}\n"
