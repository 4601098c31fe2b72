"""What became of each part of a saved run when another run continues from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from distrain.files.escaping import Lines

#: ``exact``: as it was saved. ``redistributed``: the same state, divided among the ranks in another way. ``changed``:
#: replaced by what this run's configuration says. ``reset``: lost, and started anew. ``absent``: not in the saved run.
RestoreOutcome = Literal["exact", "redistributed", "changed", "reset", "absent"]

_WORST_FIRST = ("reset", "changed", "redistributed", "exact", "absent")


@dataclass(frozen=True)
class RestoredPart:
    """One part of a run's state after a restore.

    Attributes:
        part: Name of the part.
        how: What became of it.
        why: The reason, in a few words.
    """

    part: str
    how: RestoreOutcome
    why: str


def worst(ranks: Sequence[Sequence[RestoredPart]]) -> list[RestoredPart]:
    """The worst outcome of each part over all ranks.

    Args:
        ranks: Each rank's parts; all ranks report the same parts in the same order.
    """
    return [min(outcomes, key=lambda part: _WORST_FIRST.index(part.how)) for outcomes in zip(*ranks, strict=True)]


def table(parts: Iterable[RestoredPart]) -> Lines:
    """One line per part, in columns."""
    rows = list(parts)
    name_width = max((len(row.part) for row in rows), default=0)
    how_width = max(map(len, get_args(RestoreOutcome)))
    return Lines.of(f"  {row.part:<{name_width}}  {row.how:<{how_width}}  {row.why}" for row in rows)
