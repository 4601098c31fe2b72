"""A training as a generator of steps, which a Python program can interrupt between two of them."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeAlias

#: Yields the number of updates after each; a text that is sent to it says why to stop. Returns the summary.
Steps: TypeAlias = Generator[int, str | None, dict[str, Any]]


def exhaust(steps: Steps) -> dict[str, Any]:
    """Trains to the end, and returns the summary."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
