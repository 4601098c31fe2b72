"""The picture of step times by number of hosts."""

from __future__ import annotations

import dataclasses

from distrain.tools.planning import figure
from distrain.tools.planning.plan_keys import STRATEGIES
from distrain.tools.planning.prediction import Prediction
from tests.tools.planning.workloads import cluster, workload


def test_a_curve_for_each_strategy_asked_for_that_can_run() -> None:
    drawn = figure.curves(workload(batch_size=16), cluster(1, 2), 16, ["ddp", "pipeline", "single"])
    # 32 ranks are more than ddp has samples for; pipelines of 8 ranks have too many stages for four blocks.
    assert {curve.strategy: list(curve.hosts) for curve in drawn} == {"ddp": [1, 2, 4, 8], "pipeline": [1, 2, 4, 8, 16]}
    for curve in drawn:
        assert all(prediction.keys["strategy"] == curve.strategy for prediction in curve.predictions)


def test_all_that_may_bound_a_step_is_drawn_and_named() -> None:
    drawn = figure.curves(workload(batch_size=64), cluster(1, 2), 8, STRATEGIES)
    example = drawn[0].predictions[0]
    names = []
    for part in example.parts:
        prediction = dataclasses.replace(example, parts={part: 1.0}, bubble=None)
        names.append(legend_of(prediction))
    names.append(legend_of(dataclasses.replace(example, bubble=0.9)))
    assert len(set(names)) == len(names) == 6


def legend_of(prediction: Prediction) -> str:
    axes = figure.draw([figure.Curve("ddp", [1], [prediction])], 64).axes[0]
    legend = axes.get_legend()
    assert legend is not None
    (text,) = legend.get_texts()
    return text.get_text()
