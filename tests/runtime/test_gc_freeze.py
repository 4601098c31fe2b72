"""The garbage collector while a run lasts."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from distrain.runtime.gc_freeze import frozen_gc


class Node:
    """May refer to itself."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def nothing_is_frozen() -> Iterator[None]:
    gc.unfreeze()
    yield
    gc.unfreeze()


def looked_at(node: Node) -> bool:
    return any(each is node for each in gc.get_objects())


def test_what_lives_is_not_looked_at_until_the_end() -> None:
    node = Node()
    with frozen_gc():
        assert not looked_at(node)
    assert looked_at(node)


def test_what_comes_to_life_inside_is_collected() -> None:
    with frozen_gc():
        ref = weakref.ref(Node())
        gc.collect()
        assert ref() is None


def test_it_ends_with_an_error_too() -> None:
    node = Node()
    with pytest.raises(RuntimeError), frozen_gc():
        raise RuntimeError
    assert looked_at(node)


def test_what_others_have_frozen_stays_so() -> None:
    node = Node()
    gc.freeze()
    with frozen_gc():
        pass
    assert not looked_at(node)
