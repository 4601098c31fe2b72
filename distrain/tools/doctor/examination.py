"""Everything that the doctor's ranks found out, before it is judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from distrain.tools.doctor.all_reduce import AllReduceTiming
from distrain.tools.doctor.facts import RankFacts
from distrain.tools.doctor.links import LinkMeasurement


@dataclass(frozen=True)
class Examination:
    """What the ranks of a job measured, and what to compare it with.

    Attributes:
        size: Number of ranks that should take part.
        wait_seconds: How long they had to arrive.
        facts: Facts about each rank that arrived, by rank.
        routes: Each rank's address on the route to the other hosts, by rank.
        links: What hosts measured between each other, with one measurement for each direction of connecting.
        all_reduce: All-reduce timings, one per backend.
        expected: Bytes per second that each link should carry; ``None`` if the user named no rate.
        threads: The job's ``runtime.threads``; ``None`` for distrain's own choice.
    """

    size: int
    wait_seconds: float
    facts: Mapping[int, RankFacts]
    routes: Mapping[int, str] = field(default_factory=dict)
    links: Sequence[LinkMeasurement] = ()
    all_reduce: Sequence[AllReduceTiming] = ()
    expected: float | None = None
    threads: int | None = None

    @property
    def hosts(self) -> list[RankFacts]:
        """The facts of the first rank of each machine."""
        first: dict[str, RankFacts] = {}
        for facts in self.facts.values():
            first.setdefault(facts.machine, facts)
        return list(first.values())
