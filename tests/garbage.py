"""Finds objects that only the garbage collector can free, for tests."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CellType, FrameType, FunctionType, MethodType
from typing import Any

from torch import Tensor


def cyclic_garbage(action: Callable[[], object]) -> dict[str, int]:
    """Runs ``action`` and returns what it leaves in reference cycles: the number of objects by description.

    Cycles made by other packages alone are left out: those without a tensor and without an object of distrain.
    """
    with _collected_objects_kept():
        action()
        gc.collect()
        found = Counter(_describe(item) for item in gc.garbage)
    relevant = any(name.startswith(("distrain.", "tests.", "tensor")) for name in found)
    return dict(found) if relevant else {}


@contextmanager
def _collected_objects_kept() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield
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
