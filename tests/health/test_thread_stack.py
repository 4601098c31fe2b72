"""Where a thread is, and whether it waits for other ranks."""

from __future__ import annotations

import importlib
import sys

import pytest

from distrain.communication.collectives import _BackendWork
from distrain.communication.types import DONE, Pending
from distrain.health.thread_stack import WAITING_MODULES, ThreadStack


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
