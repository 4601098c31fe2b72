"""What a pipeline run reports: its bubble, its memory, and the timeline of one step."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrain.communication.collectives import Communicator
from distrain.files.contained_folder import ContainedFolder
from distrain.files.writing import to_json
from distrain.strategies.pipeline import timeline
from distrain.strategies.pipeline.options import PipelineConfig
from distrain.strategies.pipeline.schedule import SCHEDULES, actions_of_ranks, bubble_fraction, simulate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from distrain.runtime.runtime import Runtime


def predicted_bubble(options: PipelineConfig, forward: Sequence[float], backward: Sequence[float]) -> float:
    """The bubble of the configured schedule, without the time for messages.

    Args:
        options: The strategy's keys.
        forward: Duration of each stage's forward pass, in any unit.
        backward: Duration of each stage's backward pass.
    """
    schedule = SCHEDULES[options.schedule]
    order = actions_of_ranks(schedule, options.ranks, options.stages_per_rank, options.microbatches)
    return bubble_fraction(simulate(order, forward, backward))


def predicted_bubble_of_split(options: PipelineConfig, rows: Sequence[Mapping[str, Any]]) -> float:
    """The bubble of the configured schedule with the measured times of a split's rows."""
    return predicted_bubble(options, [row["forward_ms"] for row in rows], [row["backward_ms"] for row in rows])


def described(options: PipelineConfig, replicas: int, rows: Sequence[Mapping[str, Any]]) -> str:
    """The schedule, its sizes and its predicted bubble, in a line."""
    bubble = 100 * predicted_bubble_of_split(options, rows)
    sizes = (
        f"{options.stages} stages on {options.ranks} ranks, {replicas} replicas, {options.microbatches} microbatches"
    )
    return f"{options.schedule}: {sizes}, predicted bubble {bubble:.0f} %"


def of_all_ranks(
    recorder: timeline.SpanRecorder, peaks: Mapping[str, int], group: Communicator, runtime: Runtime
) -> list[dict[str, Any]]:
    """What each rank of a pipeline has recorded; all ranks of the run call it together.

    Args:
        recorder: Of this rank.
        peaks: Bytes of its activations by stage.
        group: The ranks of the pipeline.
        runtime: This rank's surroundings.
    """
    steps = [[asdict(span) for span in step] for step in recorder.steps()]
    # After it all clocks are read at the same moment.
    runtime.communicator().barrier()
    recorded = {"clock": time.perf_counter(), "host": runtime.world.host, "steps": steps, "peaks": dict(peaks)}
    return group.all_gather_json(recorded, runtime.device)


def summary(
    options: PipelineConfig,
    split_rows: Sequence[dict[str, Any]],
    ranks: Sequence[Mapping[str, Any]],
    steps: Sequence[timeline.Lanes],
) -> dict[str, Any]:
    """The part ``pipeline`` of ``summary.json``.

    Args:
        options: The strategy's keys.
        split_rows: What each stage holds and costs.
        ranks: For each rank of the pipeline, its ``peaks``: bytes of activations by stage.
        steps: Recorded steps; the median of their bubbles is reported.
    """
    bubbles = sorted(timeline.measured_bubble(lanes) for lanes in steps)
    peaks = {int(stage): size for rank in ranks for stage, size in rank["peaks"].items()}
    return {
        "schedule": options.schedule,
        "microbatches": options.microbatches,
        "bubble_measured": bubbles[len(bubbles) // 2] if bubbles else None,
        "bubble_predicted": predicted_bubble_of_split(options, split_rows),
        "bubble_equal_stages": predicted_bubble(options, [1.0] * options.stages, [2.0] * options.stages),
        "peak_activation_mb": [round(peaks[stage] / 2**20, 3) for stage in sorted(peaks)],
        "stages": split_rows,
    }


def write_files(
    folder: Path, options: PipelineConfig, summary: Mapping[str, Any], steps: Sequence[timeline.Lanes]
) -> dict[str, Figure]:
    """Writes ``split.json`` and the timeline of the last recorded step.

    Args:
        folder: Where to; it is created.
        options: The strategy's keys.
        summary: As :func:`summary` returned it.
        steps: Recorded steps.

    Returns:
        Figures by name.
    """
    contained = ContainedFolder(folder.parent)
    contained.make_folder(folder.name)
    contained.replace_text(f"{folder.name}/split.json", to_json({"stages": summary["stages"]}))
    if not steps:
        return {}
    title = (
        f"{options.schedule}, {options.stages} stages on {options.ranks} ranks, {options.microbatches} microbatches: "
        f"bubble {summary['bubble_measured']:.0%} measured, {summary['bubble_predicted']:.0%} predicted"
    )
    return {"pipeline/timeline": timeline.write_timeline(steps[-1], title, folder)}
