"""A rank can migrate to another core, if there are several."""

from __future__ import annotations

import ctypes
import os

import pytest

from distrain.communication.shared_memory.peer import migrate_to_another_core

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is only one core")


def here() -> int:
    return int(ctypes.CDLL(None).sched_getcpu())


def test_migration_keeps_the_affinity() -> None:
    allowed = os.sched_getaffinity(0)
    left = []
    for _ in range(5):
        before = here()
        migrate_to_another_core()
        left.append(here() != before)
        assert os.sched_getaffinity(0) == allowed
    # The scheduler may have moved it back at once, but hardly each time.
    assert any(left)


def test_rank_bound_to_one_core_stays() -> None:
    allowed = os.sched_getaffinity(0)
    only = {here()}
    os.sched_setaffinity(0, only)
    try:
        migrate_to_another_core()
        assert os.sched_getaffinity(0) == only
    finally:
        os.sched_setaffinity(0, allowed)
