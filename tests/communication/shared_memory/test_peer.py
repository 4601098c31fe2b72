"""Ranks that wait for each other on one processor take two, where there are two."""

from __future__ import annotations

import ctypes
import os

import pytest

from distrain.communication.shared_memory.peer import migrate_to_another_core

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is no other processor")


def here() -> int:
    return int(ctypes.CDLL(None).sched_getcpu())


def test_a_rank_that_leaves_its_processor_may_run_on_all_as_before() -> None:
    allowed = os.sched_getaffinity(0)
    left = []
    for _ in range(5):
        before = here()
        migrate_to_another_core()
        left.append(here() != before)
        assert os.sched_getaffinity(0) == allowed
    # The system may have taken it back at once, but hardly each time.
    assert any(left)


def test_a_rank_that_may_run_nowhere_else_stays() -> None:
    allowed = os.sched_getaffinity(0)
    only = {here()}
    os.sched_setaffinity(0, only)
    try:
        migrate_to_another_core()
        assert os.sched_getaffinity(0) == only
    finally:
        os.sched_setaffinity(0, allowed)
