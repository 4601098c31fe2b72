"""What a search for the place and the cause does when its own experiments end early."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distrain.errors import Failed, Stopped, Terminated
from distrain.runtime.world import World
from distrain.verification.comparison import Difference, Limits
from distrain.verification.parting import Search
from distrain.verification.recorder import RankRecord
from distrain.verification.reference import Reference
from tests.runs import small

DIFFERENCE = Difference(1.0, "w", 1)


class AloneRanks:
    """Rank 0, which hears what it says."""

    world = World(0, 2, 0, 2, "here")

    def exchange(self, mine: dict[str, Any]) -> list[dict[str, Any]]:
        return [mine]


def search(monkeypatch: pytest.MonkeyPatch, experiments: Callable[..., Any]) -> Search:
    monkeypatch.setattr(Search, "_place", lambda *_: (None, []))
    monkeypatch.setattr(Search, "_experiments", experiments)
    serial, limits = RankRecord(0, "here"), Limits([], None, "fp64", None, 10, 10)
    ranks: Any = AloneRanks()
    return Search(ranks, small(), "fp64", serial, [serial], limits, Reference(Path("nowhere")), None)


@pytest.mark.parametrize("error", [Stopped("SIGTERM", 1), Failed("it ended")])
def test_a_request_to_end_is_not_taken_for_a_fault_of_the_experiments(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends(*_: Any) -> None:
        if isinstance(error, Failed):
            raise error from Terminated("SIGTERM")
        raise error

    with pytest.raises(type(error)):
        search(monkeypatch, ends).find("gradients", DIFFERENCE)


def test_a_module_that_cannot_run_alone_leaves_the_cause_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise Failed from ValueError("no copy")

    found = search(monkeypatch, fails).find("gradients", DIFFERENCE)
    assert found.cause == ""
    assert found.why.startswith("the experiments failed (ValueError: no copy)")
