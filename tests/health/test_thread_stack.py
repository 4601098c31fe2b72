"""Where a thread is, and whether it waits for other ranks."""

from __future__ import annotations

import gc
import importlib
import sys
import threading
import time

import pytest

from distrain.communication.collectives import _BackendWork
from distrain.communication.types import DONE, Pending
from distrain.health import thread_stack
from distrain.health.thread_stack import WAITING_MODULES, ThreadStack
from tests.harness import run_ranks


class _Waiting:
    """A collective's handle that returns, from its ``wait``, whether the calling thread is found to be waiting."""

    def wait(self) -> object:
        return ThreadStack.of_frame(sys._getframe()).waiting


def test_a_thread_inside_a_collective_is_found_to_be_waiting() -> None:
    pending: Pending = _BackendWork(_Waiting())
    assert pending.wait() is True
    assert _Waiting().wait() is False
    DONE.wait()


def test_a_stack_lists_the_innermost_calls_with_the_outermost_first() -> None:
    def recurse(depth: int) -> list[str]:
        return recurse(depth - 1) if depth else ThreadStack.of_frame(sys._getframe()).lines

    lines = recurse(30)
    assert len(lines) == 12
    assert lines[-1].startswith(f'  File "{__file__}", line ')
    assert lines[-1].endswith("recurse")


@pytest.mark.parametrize("name", sorted(WAITING_MODULES))
def test_every_module_that_waits_for_other_ranks_exists_under_its_name(name: str) -> None:
    assert importlib.import_module(name).__name__ == name


# --- the garbage collector -------------------------------------------------------------------------------------------


class _DeepThread:
    """A thread that goes 300 calls deep, and returns from them and calls them anew again and again."""

    def __init__(self) -> None:
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._thread.ident is not None
        self.identifier = self._thread.ident

    def end(self) -> None:
        self._ends.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ends.is_set():
            self._call(300)

    def _call(self, depth: int) -> None:
        if depth:
            self._call(depth - 1)
        else:
            time.sleep(0.001)


def look_at_a_running_thread() -> tuple[bool, int]:
    """Whether the collector ran in this thread at all, and how often while it read another thread's frames."""
    deep, this_thread = _DeepThread(), threading.get_ident()
    collections = during_look = 0

    def release_the_interpreter_lock(phase: str, _: object) -> None:
        nonlocal collections, during_look
        if phase == "start" and threading.get_ident() == this_thread:
            callers, frame = [], sys._getframe()
            while frame := frame.f_back:  # type: ignore[assignment]
                callers.append(frame.f_code)
            collections += 1
            during_look += ThreadStack.of_frame.__func__.__code__ in callers  # type: ignore[attr-defined]
            # As freeing a tensor does, but for longer.
            time.sleep(1e-4)

    gc.callbacks.append(release_the_interpreter_lock)
    gc.set_threshold(1)
    for _ in range(300):
        ThreadStack.of_thread(deep.identifier)
    deep.end()
    return collections > 0, during_look


def test_no_garbage_is_collected_while_another_threads_frames_are_read() -> None:
    # In a process of its own, since Python 3.11 crashes if a frame ends while it is read.
    assert run_ranks(look_at_a_running_thread, 1) == [(True, 0)]


def test_the_threshold_of_the_collector_is_restored_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bool:
        assert gc.get_threshold()[0] == 0
        raise ArithmeticError("planted")

    before = gc.get_threshold()
    monkeypatch.setattr(thread_stack, "_is_waiting", fail)
    with pytest.raises(ArithmeticError, match="planted"):
        ThreadStack.of_thread(threading.get_ident())
    assert gc.get_threshold() == before


def test_the_threshold_of_the_collector_is_restored_after_two_threads_looked_at_once() -> None:
    before = gc.get_threshold()
    identifier = threading.get_ident()

    def look() -> None:
        for _ in range(500):
            ThreadStack.of_thread(identifier)

    threads = [threading.Thread(target=look) for _ in range(3)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert gc.get_threshold() == before


@pytest.mark.parametrize("enabled", [True, False])
def test_what_another_thread_sets_meanwhile_is_kept(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def switch(*_: object) -> bool:
        gc.set_threshold(123)
        if enabled:
            gc.enable()
        else:
            gc.disable()
        return False

    thresholds = gc.get_threshold()
    monkeypatch.setattr(thread_stack, "_is_waiting", switch)
    try:
        ThreadStack.of_thread(threading.get_ident())
        assert (gc.isenabled(), gc.get_threshold()[0]) == (enabled, 123)
    finally:
        gc.enable()
        gc.set_threshold(*thresholds)
