"""Python's garbage collector, kept from looking again and again at what a run needs to its end."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def frozen_gc() -> Iterator[None]:
    """What lives now is not looked at inside.

    A full collection goes through every object, of which imports alone leave hundreds of thousands: it holds up a rank
    for more than a tenth of a second, at a moment of its own, while the others wait. What comes to life inside is
    collected as ever. Where somebody has frozen objects already, they know better.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
