"""Excludes long-lived objects from Python's garbage collection during training."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def frozen_gc() -> Iterator[None]:
    """Excludes currently live objects from garbage collection inside this block.

    A full collection visits every object, and imports alone create hundreds of thousands. It would delay a rank by more
    than 0.1 s, each rank at another moment, while the others wait. Objects created inside the block are collected as
    usual. Does nothing if the caller has already frozen objects.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
