"""Drawn networks train as in one process, or all ranks refuse them with the same line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.harness import run_ranks
from tests.runs import relative_difference
from tests.strategies.tensor_parallel import drawn
from tests.strategies.test_drawn_modules import Outcome, train_drawn

OPTIONS = ("model._target_=tests.strategies.tensor_parallel.drawn.model", "optimizer.lr=0.01")
BOUND = 1e-11


def problem_of(single: Outcome, ranks: list[Outcome]) -> str:
    """What is wrong with a network; empty if nothing is."""
    refusals = {rank.get("refused", "") for rank in ranks}
    if refusals != {""}:
        expected = "refused" in single or all("no layer of " in line for line in refusals)
        return "" if expected and len(refusals) == 1 and "\n" not in "".join(refusals) else f"{sorted(refusals)}"
    if "refused" in single:
        return f"trains, but single is refused: {single['refused']}"
    first, *others = (rank["model"] for rank in ranks)
    if any(not torch.equal(tensor, other[name]) for other in others for name, tensor in first.items()):
        return "ranks have different models"
    difference = relative_difference(first, single["model"])
    return "" if difference <= BOUND else f"relative difference {difference:.1e}"


@pytest.mark.parametrize(
    ("ranks", "seeds"),
    [
        (3, range(8)),
        *(
            pytest.param(ranks, range(first, first + 50), marks=pytest.mark.soak)
            for ranks in (2, 3)
            for first in range(0, 150, 50)
        ),
    ],
    ids=str,
)
def test_drawn_networks_train_as_in_one_process_or_all_ranks_refuse_them(
    ranks: int, seeds: range, tmp_path: Path
) -> None:
    (single,) = run_ranks(train_drawn, 1, seeds, str(tmp_path / "one"), *OPTIONS, "strategy=single")
    several = run_ranks(train_drawn, ranks, seeds, str(tmp_path / "many"), *OPTIONS, "strategy=tensor_parallel")
    outcomes = dict(zip(seeds, zip(single, *several, strict=True), strict=True))
    problems = {seed: problem_of(one, list(many)) for seed, (one, *many) in outcomes.items()}
    wrong = [f"network {seed}, {drawn.names(seed)}: {problem}" for seed, problem in problems.items() if problem]
    assert not wrong, "\n".join(wrong)
    divided = sum("refused" not in rank for rank in several[0])
    assert divided > len(seeds) / 2
