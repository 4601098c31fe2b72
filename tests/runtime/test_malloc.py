"""Memory that is freed stays with the process, which gets it again without asking the system."""

from __future__ import annotations

import platform
import resource
from collections.abc import Callable

import pytest
import torch

from distrain.runtime.malloc import retain_freed_memory
from tests.harness import run_ranks

MB = 1024 * 1024
needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")


def faults(prepare: Callable[[], bool]) -> tuple[bool, int]:
    """What a preparation says, and how many new pages ten rounds of the same allocations take after it."""
    kept = prepare()

    def allocate() -> None:
        held = [torch.ones(size * MB // 4) for size in (5, 40)]
        held.clear()

    allocate()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        allocate()
    return kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def nothing() -> bool:
    return False


@needs_glibc
def test_a_step_s_memory_is_the_last_step_s() -> None:
    ((_, usual),) = run_ranks(faults, 1, nothing)
    ((kept, few),) = run_ranks(faults, 1, retain_freed_memory)
    # Blocks of 40 MiB are given back each time, unless they are kept; a page may be as large as 2 MiB.
    assert usual >= 10 * 40 / 2
    assert kept
    assert few < usual / 5


def test_settings_of_the_environment_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    assert not retain_freed_memory()
