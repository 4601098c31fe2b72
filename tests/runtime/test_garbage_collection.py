"""Objects that exist before training are excluded from garbage collection during it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from distrain.runtime.garbage_collection import frozen_gc
from tests import garbage


class Node:
    """Refers to itself, so only the garbage collector can free it."""

    def __init__(self) -> None:
        self.self = self


@pytest.fixture(autouse=True)
def unfrozen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is excluded at first, and counted as Python does; afterwards what the other tests exclude."""
    monkeypatch.setattr(gc, "get_freeze_count", garbage.count_frozen)
    gc.unfreeze()
    yield
    gc.unfreeze()
    gc.freeze()


def is_tracked(node: Node) -> bool:
    return any(tracked is node for tracked in gc.get_objects())


def test_live_objects_are_excluded_until_the_block_ends() -> None:
    node = Node()
    with frozen_gc():
        assert not is_tracked(node)
    assert is_tracked(node)


def test_objects_created_inside_are_collected() -> None:
    with frozen_gc():
        ref = weakref.ref(Node())
        gc.collect()
        assert ref() is None


def test_what_is_garbage_before_is_not_kept() -> None:
    ref = weakref.ref(Node())
    with frozen_gc():
        assert ref() is None


def test_an_error_ends_the_exclusion_too() -> None:
    node = Node()
    with pytest.raises(RuntimeError), frozen_gc():
        raise RuntimeError
    assert is_tracked(node)


def test_objects_frozen_by_the_caller_stay_frozen() -> None:
    node = Node()
    gc.freeze()
    with frozen_gc():
        pass
    assert not is_tracked(node)
