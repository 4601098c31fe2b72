"""SignalHandler that ask a run to stop."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from distrain.errors import Terminated
from distrain.runtime import signals
from distrain.runtime.signals import SignalHandler


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


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_is_recorded_while_the_target_is_stoppable(name: str, target: Target) -> None:
    send(name)
    assert target.stop_requested == name


def test_sigterm_ends_a_run_that_is_not_stoppable(target: Target) -> None:
    target.stoppable = False
    with pytest.raises(Terminated, match="ended by SIGTERM"):
        send("SIGTERM")
    assert target.stop_requested is None


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


def test_previous_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    handler = SignalHandler(Target())
    handler.install()
    assert signal.getsignal(signal.SIGTERM) != before[0]
    handler.restore()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before
