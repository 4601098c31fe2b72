"""Where a model may be split, and why some models are refused."""

from __future__ import annotations

import pytest
from torch import nn

from distrain.errors import ConfigError
from distrain.models.base import BlockSequence
from distrain.strategies.pipeline import split


def linear(count: int) -> BlockSequence:
    return BlockSequence({f"block{n}": nn.Linear(4, 4) for n in range(count)})


@pytest.mark.parametrize(
    ("boundaries", "stages", "expected"),
    [
        (["b", "d"], 3, [0, 1, 3]),
        (["d"], 2, [0, 3]),
        (["b", "d"], 2, None),
        (["b"], 3, None),
        ([], 2, None),
        (["d", "b"], 3, None),
        (["b", "b"], 3, None),
        (["a", "b"], 3, None),
        (["c"], 2, None),
        (["x" * 1000], 2, None),
    ],
)
def test_a_saved_split_is_kept_only_if_it_is_one_of_this_model(
    boundaries: list[str], stages: int, expected: list[int] | None
) -> None:
    assert split.starts_of(boundaries, ["a", "b", "c", "d"], [1, 3], stages) == expected


def test_blocks_that_share_a_parameter_stay_in_one_stage() -> None:
    model = linear(4)
    model[2].weight = model[0].weight
    assert split.allowed_cuts(model) == [3]
    with pytest.raises(ConfigError, match=r"strategy.stages=3: .*so at most 2 stages are possible"):
        split.check(model, 3, [])
    with pytest.raises(ConfigError, match=r"strategy.boundaries=block1: lies between blocks that share"):
        split.check(model, 2, ["block1"])


@pytest.mark.parametrize(
    ("model", "stages", "boundaries", "message"),
    [
        (linear(2), 3, [], "strategy.stages=3: the model has only 2 blocks, so at most 2 stages are possible"),
        (linear(3), 2, ["nothing"], "strategy.boundaries=nothing: is no block"),
        (linear(3), 2, ["block0"], "strategy.boundaries=block0: is no block that a stage could begin with"),
        (linear(4), 3, ["block2", "block1"], "must be in the model's order"),
        (linear(4), 3, ["block1"], "3 stages have 2 boundaries, not 1"),
    ],
)
def test_models_that_cannot_be_split_are_refused_with_the_reason(
    model: nn.Module, stages: int, boundaries: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        split.check(model, stages, boundaries)
    assert message in str(caught.value)
