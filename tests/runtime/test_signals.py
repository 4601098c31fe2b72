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
class Asked:
    """What the signals ask to stop."""

    stoppable: bool = True
    stop_requested: str | None = None


@pytest.fixture
def asked() -> Iterator[Asked]:
    """Handles the test process's own signals."""
    asked = Asked()
    handled = SignalHandler(asked)
    handled.install()
    yield asked
    handled.restore()


def send(name: str) -> None:
    os.kill(os.getpid(), getattr(signal, name))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_sets_a_flag_while_somebody_looks(name: str, asked: Asked) -> None:
    send(name)
    assert asked.stop_requested == name


def test_otherwise_sigterm_ends_the_run(asked: Asked) -> None:
    asked.stoppable = False
    with pytest.raises(Terminated, match="ended by SIGTERM"):
        send("SIGTERM")
    assert asked.stop_requested is None


def test_otherwise_sigusr1_is_ignored_with_a_word(asked: Asked, caplog: pytest.LogCaptureFixture) -> None:
    asked.stoppable = False
    with caplog.at_level(logging.WARNING):
        send("SIGUSR1")
    assert asked.stop_requested is None
    assert "SIGUSR1 is ignored" in caplog.text


def test_a_second_sigterm_ends_the_run(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_SAME_REQUEST_SECONDS", 0)
    send("SIGTERM")
    with pytest.raises(Terminated):
        send("SIGTERM")


def test_the_same_request_may_come_from_the_system_and_from_the_launcher(asked: Asked) -> None:
    send("SIGTERM")
    asked.stoppable = False
    send("SIGTERM")
    assert asked.stop_requested == "SIGTERM"


def test_sigterm_after_a_warning_is_still_a_request(asked: Asked) -> None:
    send("SIGUSR1")
    send("SIGTERM")
    assert asked.stop_requested == "SIGTERM"
    send("SIGUSR1")
    assert asked.stop_requested == "SIGTERM"


def test_a_run_that_is_failing_hears_nothing() -> None:
    asked = Asked(stoppable=False)
    handled = SignalHandler(asked)
    handled.install()
    try:
        handled.deaf = True
        send("SIGTERM")
        assert asked.stop_requested is None
    finally:
        handled.restore()


def test_handlers_are_left_as_they_were() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    handled = SignalHandler(Asked())
    handled.install()
    assert signal.getsignal(signal.SIGTERM) != before[0]
    handled.restore()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before
