"""Finds objects that only the garbage collector can free, for tests, and spares it those that stay."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import CellType, FrameType, FunctionType, MethodType
from typing import Any

from torch import Tensor

#: As Python counts what is excluded from garbage collection.
count_frozen = gc.get_freeze_count


def freeze() -> None:
    """Excludes all objects that exist now from garbage collection, of which every run in this process makes some.

    A run also asks whether anything is excluded. Python would count the hundreds of thousands each time.
    """
    gc.collect()
    gc.freeze()
    count = count_frozen()
    gc.get_freeze_count = lambda: count


@contextmanager
def cyclic_garbage() -> Iterator[dict[str, int]]:
    """Finds what the block leaves in reference cycles.

    Yields:
        A dictionary that is filled at the end of the block: the number of objects by description. Cycles made by other
        packages alone are left out: it stays empty if there is neither a tensor nor an object of distrain.
    """
    found: dict[str, int] = {}
    was_enabled = gc.isenabled()
    gc.disable()
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield found
        gc.collect()
        counts = Counter(_describe(item) for item in gc.garbage)
        if any(name.startswith(("distrain.", "tests.", "tensor")) for name in counts):
            found.update(counts)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        if was_enabled:
            gc.enable()


def _describe(item: Any) -> str:
    if isinstance(item, Tensor):
        return f"tensor {list(item.shape)}"
    if isinstance(item, FunctionType | MethodType):
        return f"{item.__module__}.{item.__qualname__}"
    if isinstance(item, FrameType):
        return f"{item.f_globals.get('__name__')}.{item.f_code.co_name} (frame)"
    if isinstance(item, CellType):
        return "cell"
    return f"{type(item).__module__}.{type(item).__qualname__}"
