"""Freed memory stays with the process, which reuses it without asking the operating system."""

from __future__ import annotations

import platform
import resource
from collections.abc import Callable

import pytest
import torch

from distrain.runtime.malloc import retain_freed_memory, return_large_blocks
from tests.harness import run_ranks

MB = 1024 * 1024
needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")


def large_blocks_again() -> bool:
    return retain_freed_memory() and return_large_blocks()


def page_faults(prepare: Callable[[], bool]) -> tuple[bool, int]:
    """Returns the result of ``prepare``, and the page faults of ten rounds of the same allocations after it."""
    result = prepare()

    def allocate() -> None:
        held = [torch.ones(size * MB // 4) for size in (5, 40)]
        held.clear()

    allocate()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        allocate()
    return result, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def change_nothing() -> bool:
    return False


@needs_glibc
def test_a_step_reuses_the_memory_of_the_last_one() -> None:
    ((_, without),) = run_ranks(page_faults, 1, change_nothing)
    ((retains, with_retention),) = run_ranks(page_faults, 1, retain_freed_memory)
    # Without it, blocks of 40 MiB are returned each time. A page may be as large as 2 MiB.
    assert without >= 10 * 40 / 2
    assert retains
    assert with_retention < without / 5
    ((returns, with_return),) = run_ranks(page_faults, 1, large_blocks_again)
    assert returns
    assert with_return >= 10 * 45 / 2


def test_settings_in_the_environment_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    assert not retain_freed_memory()
    assert not return_large_blocks()
