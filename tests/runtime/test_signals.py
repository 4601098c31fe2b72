"""SignalHandler that ask a run to stop."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from distrain.errors import LAUNCHER_ENDED, Terminated, termination_behind
from distrain.runtime import signals
from distrain.runtime.signals import RememberedRequests, SignalHandler

NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")


@dataclass
class Target:
    """The object that the signals ask to stop."""

    stoppable: bool = True
    stop_requested: str | None = None


@pytest.fixture
def target() -> Iterator[Target]:
    """The target of this process's signals."""
    target = Target()
    handler = SignalHandler(target)
    handler.install()
    yield target
    handler.restore()


def send(name: str) -> None:
    os.kill(os.getpid(), getattr(signal, name))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP", "SIGQUIT"])
def test_a_signal_is_recorded_while_the_target_is_stoppable(name: str, target: Target) -> None:
    send(name)
    assert target.stop_requested == name


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT"])
def test_a_signal_ends_a_run_that_is_not_stoppable(name: str, target: Target) -> None:
    target.stoppable = False
    with pytest.raises(Terminated, match=f"ended by {name}"):
        send(name)
    # A launcher passes on the signal, which must not interrupt how the run ends.
    send("SIGTERM")
    # If a library had caught the exception, the run would stop once it can.
    assert target.stop_requested == name


def test_sigusr1_is_ignored_with_a_warning_if_the_run_is_not_stoppable(
    target: Target, caplog: pytest.LogCaptureFixture
) -> None:
    target.stoppable = False
    with caplog.at_level(logging.WARNING):
        send("SIGUSR1")
    assert target.stop_requested is None
    assert "SIGUSR1 is ignored" in caplog.text


def test_a_second_sigterm_ends_the_run(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_SAME_REQUEST_SECONDS", 0)
    send("SIGTERM")
    with pytest.raises(Terminated):
        send("SIGTERM")


def test_a_signal_forwarded_by_the_launcher_is_the_same_request(target: Target) -> None:
    send("SIGTERM")
    target.stoppable = False
    send("SIGTERM")
    assert target.stop_requested == "SIGTERM"


def test_sigterm_after_sigusr1_is_still_a_request(target: Target) -> None:
    send("SIGUSR1")
    send("SIGTERM")
    assert target.stop_requested == "SIGTERM"
    send("SIGUSR1")
    assert target.stop_requested == "SIGTERM"


def test_a_run_that_is_failing_ignores_signals() -> None:
    target = Target(stoppable=False)
    handler = SignalHandler(target)
    handler.install()
    try:
        handler.ignored = True
        send("SIGTERM")
        assert target.stop_requested is None
    finally:
        handler.restore()


def test_a_function_that_ends_the_run_is_not_interrupted_even_before_its_first_line() -> None:
    def end_run() -> bool:
        send("SIGTERM")
        return True

    target = Target(stoppable=False)
    handler = SignalHandler(target, [end_run.__code__])
    handler.install()
    try:
        assert end_run()
        assert target.stop_requested is None
    finally:
        handler.restore()


def test_the_request_behind_an_error_of_an_interrupted_library_is_found() -> None:
    def interrupted_library() -> None:
        try:
            raise Terminated("SIGTERM")
        finally:
            int("no number")

    with pytest.raises(ValueError, match="invalid literal") as caught:
        interrupted_library()
    request = termination_behind(caught.value)
    assert request is not None
    assert request.request == "SIGTERM"
    caught.value.__context__ = caught.value
    assert termination_behind(caught.value) is None


@pytest.mark.parametrize("torchrun", [False, True])
@pytest.mark.parametrize("first", [*NAMES, LAUNCHER_ENDED])
@pytest.mark.parametrize("second", [*NAMES, LAUNCHER_ENDED])
@pytest.mark.parametrize("seconds", [0.1, 1, 100])
def test_a_second_request_ends_the_run_unless_it_is_an_echo_of_the_first(
    first: str, second: str, seconds: float, torchrun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    if first == "SIGINT":
        # Ctrl-C reaches torchrun, which sends SIGINT once; a second one makes it send SIGTERM, or end.
        echo = second not in ("SIGTERM", LAUNCHER_ENDED) and seconds < 5 if torchrun else seconds < 5
        echo = seconds < 0.3 if second == "SIGINT" and not torchrun else echo
    else:
        echo = seconds < 5 or LAUNCHER_ENDED in (first, second)
    if "SIGUSR1" in (first, second):
        echo = True
    target = Target()
    handler = SignalHandler(target)
    handler.install()
    clock = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    try:
        send_request(handler, first)
        assert target.stop_requested == first
        clock += seconds
        if echo:
            send_request(handler, second)
            assert target.stop_requested == (second if first == "SIGUSR1" else first)
        else:
            with pytest.raises(Terminated):
                send_request(handler, second)
    finally:
        handler.restore()


def send_request(handler: SignalHandler, name: str) -> None:
    if name == LAUNCHER_ENDED:
        handler.report_launcher_end()
    else:
        send(name)


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP", "SIGQUIT"])
def test_a_signal_that_nohup_or_a_shell_has_ignored_stays_ignored(name: str) -> None:
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_IGN)
    target = Target()
    handler = SignalHandler(target)
    try:
        handler.install()
        send(name)
        assert target.stop_requested is None
        handler.restore()
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_sigquit_writes_all_stacks_also_while_the_main_thread_hangs(tmp_path: Path, target: Target) -> None:
    handler = SignalHandler(target)
    handler.install()
    (tmp_path / "rank_0.log").write_text("a line\n")
    handler.dump_stacks_to(tmp_path / "rank_0.log")
    send("SIGQUIT")
    assert target.stop_requested == "SIGQUIT"
    handler.restore()
    assert "test_sigquit_writes_all_stacks" in (tmp_path / "rank_0.log").read_text()


def test_previous_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    handler = SignalHandler(Target())
    handler.install()
    assert signal.getsignal(signal.SIGTERM) != before[0]
    handler.restore()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before


def test_a_request_that_no_short_run_acts_on_is_remembered() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with RememberedRequests() as between:
        send("SIGHUP")
        send("SIGTERM")
    assert between.first == "SIGHUP"
    with RememberedRequests() as at_its_end:
        handler = SignalHandler(Target())
        handler.install()
        handler.ignored = True
        send("SIGTERM")
        handler.restore()
    assert at_its_end.first == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == before
