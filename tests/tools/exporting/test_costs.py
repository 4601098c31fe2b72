"""What a compressed program may cost, and how that is shown."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from distrain.errors import ConfigError
from distrain.tools.exporting import costs
from distrain.tools.exporting.costs import Cost


def cost(name: str, score: float) -> Cost:
    return Cost(name, score, 12_345, [1.234, 56.78])


@pytest.mark.parametrize(
    ("higher_is_better", "plain", "compressed", "accepted"),
    [
        (True, 0.90, 0.891, True),
        (True, 0.90, 0.95, True),
        (True, 0.90, 0.889, False),
        (True, 0.90, float("nan"), False),
        (False, 4.0, 4.03, True),
        (False, 4.0, 3.0, True),
        (False, 4.0, 4.05, False),
    ],
)
def test_a_score_may_drop_by_points_and_an_error_rise_by_a_share(
    higher_is_better: bool, plain: float, compressed: float, accepted: bool
) -> None:
    task: Any = SimpleNamespace(score="metric", higher_is_better=higher_is_better)
    both = cost("fp32", plain), cost("int8", compressed)
    if accepted:
        costs.check_drop(task, *both, 0.01)
    else:
        with pytest.raises(ConfigError, match=r"max_drop=0.01: the test metric is .* in fp32 and .* in int8, worse by"):
            costs.check_drop(task, *both, 0.01)


def test_a_table_is_in_columns_on_a_terminal_and_with_bars_in_a_card() -> None:
    table = costs.rows("accuracy", [cost("fp32", 0.91234), cost("int8", 0.9)])
    assert costs.as_text(table) == [
        "      accuracy   bytes  ms for 1 image  ms for 32 images",
        "fp32    0.9123  12,345            1.23              56.8",
        "int8    0.9000  12,345            1.23              56.8",
    ]
    assert costs.as_markdown(table).splitlines()[1:] == [
        "| --- | --: | --: | --: | --: |",
        "| fp32 | 0.9123 | 12,345 | 1.23 | 56.8 |",
        "| int8 | 0.9000 | 12,345 | 1.23 | 56.8 |",
    ]


def test_calls_are_timed_in_turns_with_as_many_images() -> None:
    calls: list[tuple[str, int]] = []

    def program(name: str) -> Any:
        def run(images: Tensor) -> dict[str, Tensor]:
            calls.append((name, len(images)))
            return {}

        return run

    found = costs.latencies({"a": program("a"), "b": program("b")}, torch.zeros(3, 1, 2, 2))
    assert {name: len(values) for name, values in found.items()} == {"a": 2, "b": 2}
    assert [size for _, size in calls] == sorted(size for _, size in calls)
    assert calls[:4] == [("a", 1), ("b", 1), ("a", 1), ("b", 1)]
    assert calls[-1] == ("b", 32)
