"""What became of each part of a saved run when another goes on from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

#: ``exact``: as it was saved. ``redistributed``: the same whole, held by other ranks. ``changed``: as this run's
#: configuration wants it. ``reset``: lost, and begun anew. ``absent``: the saved run had none.
How = Literal["exact", "redistributed", "changed", "reset", "absent"]

_WORST_FIRST = ("reset", "changed", "redistributed", "exact", "absent")


@dataclass(frozen=True)
class Carried:
    """One part of a run's state.

    Attributes:
        part: What it is.
        how: What became of it.
        why: The reason, in a few words.
    """

    part: str
    how: How
    why: str


def worst(ranks: Sequence[Sequence[Carried]]) -> list[Carried]:
    """Of what ranks say of the same parts, that which lost most.

    Args:
        ranks: What each rank says, all with the same parts in the same order.
    """
    return [min(said, key=lambda each: _WORST_FIRST.index(each.how)) for said in zip(*ranks, strict=True)]


def table(parts: Iterable[Carried]) -> str:
    """One line a part, in columns."""
    rows = list(parts)
    part = max((len(row.part) for row in rows), default=0)
    how = max(map(len, get_args(How)))
    return "\n".join(f"  {row.part:<{part}}  {row.how:<{how}}  {row.why}" for row in rows)
