"""Draws how a step's time falls as hosts are added, and what bounds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distrain.strategies.pipeline.timeline import draw_timeline
from distrain.tools.planning import candidates
from distrain.tools.planning.cluster import Cluster
from distrain.tools.planning.plan_keys import STRATEGIES
from distrain.tools.planning.prediction import Prediction
from distrain.tools.planning.steps.common import setting_of
from distrain.tools.planning.workload import Workload

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = {"compute": "o", "compression": "P", "update": "s", "waiting": "^", "stragglers": "D", "bubble": "v"}
_WORDS = {
    "compute": "computing",
    "compression": "compressing",
    "update": "data and optimizer",
    "waiting": "waiting for other ranks or the network",
    "stragglers": "waiting for the slowest rank",
    "bubble": "idle ranks of the pipeline",
}


@dataclass(frozen=True)
class Curve:
    """The fastest configuration of one strategy on growing clusters.

    Attributes:
        strategy: Its name.
        hosts: Numbers of hosts.
        predictions: The fastest configuration on each.
    """

    strategy: str
    hosts: Sequence[int]
    predictions: Sequence[Prediction]


def curves(
    workload: Workload, cluster: Cluster, most_hosts: int, strategies: Sequence[str] = STRATEGIES
) -> list[Curve]:
    """The fastest configuration of each strategy on 1, 2, 4 … hosts, for the same global batch.

    Args:
        workload: The training.
        cluster: Machines of which there may be more.
        most_hosts: The largest number of hosts.
        strategies: Names of the strategies to draw.
    """
    numbers = [1]
    while numbers[-1] * 2 <= most_hosts:
        numbers.append(numbers[-1] * 2)
    found: dict[str, dict[int, Prediction]] = {name: {} for name in strategies}
    for hosts in numbers:
        setting = setting_of(workload, cluster.with_hosts(hosts))
        for prediction in candidates.predictions(setting, strategies, list(workload.compressors)):
            of_strategy = found[prediction.keys["strategy"]]
            if hosts not in of_strategy or prediction.seconds < of_strategy[hosts].seconds:
                # The picture needs no timelines.
                of_strategy[hosts] = dataclasses.replace(prediction, simulated=None)
    return [Curve(name, list(points), list(points.values())) for name, points in found.items() if points]


def draw_step(predictions: Sequence[Prediction]) -> Figure | None:
    """Draws the simulated step of the fastest pipeline, as a run draws its measured one; ``None`` if there is none.

    Args:
        predictions: In ascending order of a step's time.
    """
    for prediction in predictions:
        if prediction.bubble is not None and prediction.simulated is not None:
            keys = {key.removeprefix("strategy."): value for key, value in prediction.keys.items()}
            lanes = prediction.simulated.lanes
            stages = keys.get("stages", keys.get("mesh.pipeline"))
            # Of the ranks that divide a stage's layers, one is drawn.
            ranks = len(lanes) * int(keys.get("mesh.tensor", 1))
            title = (
                f"{keys['schedule']}, {stages} stages on {ranks} ranks, {keys['microbatches']} microbatches: a step of "
                f"{1000 * prediction.seconds:.3g} ms and a bubble of {prediction.bubble:.0%}, both predicted"
            )
            return draw_timeline(lanes, title)
    return None


def draw(drawn: Sequence[Curve], batch_size: int) -> Figure:
    """Draws a step's time against the number of hosts; the marker says what takes most of it.

    Args:
        drawn: The curves.
        batch_size: Samples of a step.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(9, 5.5), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    bounds: set[str] = set()
    for index, curve in enumerate(drawn):
        times = [1000 * prediction.seconds for prediction in curve.predictions]
        axes.plot(curve.hosts, times, color=f"C{index}", linewidth=1.5, label=curve.strategy)
        for hosts, time, prediction in zip(curve.hosts, times, curve.predictions, strict=True):
            bounds.add(prediction.bound)
            axes.plot(hosts, time, color=f"C{index}", marker=_MARKERS[prediction.bound], markersize=6)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    numbers = sorted({hosts for curve in drawn for hosts in curve.hosts})
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.set_xlabel("hosts")
    axes.set_ylabel(f"milliseconds of a step of {batch_size} samples")
    axes.grid(visible=True, which="both", alpha=0.25)
    strategies = axes.legend(loc="upper right", title="fastest configuration of")
    axes.add_artist(strategies)
    handles = [
        Line2D([], [], color="#555555", marker=_MARKERS[bound], linestyle="", label=_WORDS[bound])
        for bound in _MARKERS
        if bound in bounds
    ]
    axes.legend(handles=handles, loc="lower left", title="most time goes into")
    return figure
