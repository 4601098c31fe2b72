"""When Python collects garbage: rarely during a training, and always after it."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


def free_finished_trainings() -> None:
    """Frees the tensors and process groups of trainings in this process that have ended.

    A trainer and its parts refer to each other, so only a garbage collection frees them. Python starts one by the
    number of objects, not by their size: after several trainings of ResNet-18 a process held 13 GB instead of 3. A
    thread of a process group that still runs when Python ends may abort the process ("terminate called").
    """
    gc.collect()


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
    # What is garbage by now would never be freed inside.
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
