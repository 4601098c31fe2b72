"""Where to split a model into stages: the cuts whose slowest stage is fastest, found exactly from measured times."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from distrain import torch_internals
from distrain.communication.collectives import Communicator
from distrain.errors import ConfigError, config_error
from distrain.files.escaping import Lines
from distrain.gradients.linear_partition import linear_partition
from distrain.models.base import is_sequence
from distrain.runtime.agreement import agreed
from distrain.strategies.pipeline.block_costs import BlockCost, measure_blocks, measure_point_to_point
from distrain.strategies.pipeline.blocks import HandOver, TracedBlock, named_blocks
from distrain.strategies.pipeline.options import PipelineConfig
from distrain.strategies.pipeline.traced_model import traced_model
from distrain.strategies.precision import Precision

if TYPE_CHECKING:
    from distrain.runtime.runtime import Runtime

log = logging.getLogger(__name__)


def check(model: nn.Module, stages: int, boundaries: Sequence[str]) -> None:
    """Refuses a model that can't be split into so many stages, as far as that is known without running it.

    Args:
        model: The whole model.
        stages: Number of stages.
        boundaries: First block of each stage but the first; empty if they are to be chosen.

    Raises:
        ConfigError: The message says why.
    """
    kind = type(model).__name__
    # A pipeline calls the blocks, and never the model.
    if torch_internals.has_hooks(model):
        raise config_error("model", f"{kind} has hooks, which a pipeline does not call; register them at a submodule")
    if isinstance(model, nn.Sequential) and is_sequence(model):
        check_blocks(model, stages, boundaries)
    elif not torch_internals.has_plain_state(model):
        problem = f"{kind} loads or saves its state in its own way, and a pipeline does so with each part of it"
        raise config_error("model", f"{problem}; do it in a submodule")


def as_sequence(
    model: nn.Module,
    example: Tensor,
    precision: Precision,
    options: PipelineConfig,
    still: Set[str] = frozenset(),
    *,
    auxiliary: bool,
) -> nn.Sequential:
    """The model itself if it is a sequence of blocks; else its forward pass, recorded and cut into blocks.

    Args:
        model: The whole model.
        example: Inputs ``[N, …]``.
        precision: Of forward passes.
        options: The strategy's keys.
        still: Names of the modules that are in evaluation mode in some epochs, since their parameters are frozen.
        auxiliary: Whether the loss depends on auxiliary heads.

    Raises:
        ConfigError: It can't be traced, or not be cut into so many stages.
    """
    if isinstance(model, nn.Sequential) and is_sequence(model):
        return model
    traced = traced_model(model, example, precision, options.stages, options.boundaries, still, auxiliary=auxiliary)
    check_blocks(traced, options.stages, options.boundaries)
    return traced


def check_blocks(model: nn.Sequential, stages: int, boundaries: Sequence[str]) -> None:
    """As :func:`check`, for a sequence of blocks."""
    names = [name for name, _ in named_blocks(model)]
    cuts = allowed_cuts(model)
    possible = f"so at most {len(cuts) + 1} stages are possible"
    if stages > len(names):
        raise ConfigError("strategy.stages", stages, f"the model has only {len(names)} blocks, {possible}")
    for name in boundaries:
        if name not in names[1:]:
            raise ConfigError("strategy.boundaries", name, "is no block that a stage could begin with", names[1:])
    if boundaries and [names.index(name) for name in boundaries] != sorted({names.index(name) for name in boundaries}):
        raise ConfigError("strategy.boundaries", list(boundaries), "must be in the model's order, without repetition")
    if boundaries and len(boundaries) != stages - 1:
        problem = f"{stages} stages have {stages - 1} boundaries, not {len(boundaries)}"
        raise ConfigError("strategy.boundaries", list(boundaries), problem)
    if len(cuts) < stages - 1:
        problem = f"blocks that share parameters must be in one stage, {possible}"
        raise ConfigError("strategy.stages", stages, problem)
    for name in boundaries:
        if names.index(name) not in cuts:
            raise ConfigError("strategy.boundaries", name, "lies between blocks that share a parameter")


def allowed_cuts(model: nn.Sequential) -> list[int]:
    """Indices of the blocks that a stage may begin with: no parameter or buffer is used before and after the cut."""
    tensors = [[id(tensor) for tensor in (*block.parameters(), *block.buffers())] for _, block in named_blocks(model)]
    cuts = []
    for cut in range(1, len(tensors)):
        before = {tensor for of_block in tensors[:cut] for tensor in of_block}
        if not any(tensor in before for of_block in tensors[cut:] for tensor in of_block):
            cuts.append(cut)
    return cuts


def possible_cuts(model: nn.Sequential, traced: Sequence[TracedBlock], options: PipelineConfig) -> list[int]:
    """Indices of the blocks that a stage may begin with, since what the block before hands over can be sent.

    Args:
        model: The whole model.
        traced: What each block hands over.
        options: The strategy's keys.

    Raises:
        ConfigError: A stage would begin after a block whose output can't be sent.
    """
    names = [name for name, _ in named_blocks(model)]
    cuts = [cut for cut in allowed_cuts(model) if traced[cut - 1].output is not None]
    for name in options.boundaries:
        before = traced[names.index(name) - 1]
        if before.output is None:
            raise ConfigError("strategy.boundaries", name, f"the block before it, {before.name}, {before.problem}")
    if len(cuts) < options.stages - 1:
        problems = "; ".join(f"{block.name} {block.problem}" for block in traced[:-1] if block.output is None)
        problem = f"the model can be cut at {len(cuts)} places only: {problems}"
        raise ConfigError("strategy.stages", options.stages, problem)
    return cuts


@dataclass(frozen=True)
class Split:
    """A model's division into stages; equal on all ranks.

    Attributes:
        starts: Index of each stage's first block.
        rows: What each stage holds and costs, one row per stage, as ``split.json`` has them.
    """

    starts: list[int]
    rows: list[dict[str, Any]]

    @property
    def boundaries(self) -> list[str]:
        """First block of each stage but the first, as ``strategy.boundaries`` has them."""
        return [row["blocks"][0] for row in self.rows[1:]]

    def table(self) -> Lines:
        """The rows as text, one line per stage."""
        lines = ["stage  rank  parameters  forward ms  backward ms  activation MB  sends MB/sample  tensors  blocks"]
        for row in self.rows:
            blocks = row["blocks"]
            names = blocks[0] if len(blocks) == 1 else f"{blocks[0]} … {blocks[-1]} ({len(blocks)})"
            lines.append(
                f"{row['stage']:5}  {row['rank']:4}  {row['parameters']:10,}  {row['forward_ms']:10.2f}  "
                f"{row['backward_ms']:11.2f}  {row['activation_mb']:13.2f}  {row['sends_mb_per_sample']:15.4f}  "
                f"{row['sends_tensors']:7}  {names}"
            )
        return Lines.of(lines)


def choose_split(
    model: nn.Sequential,
    example: Tensor,
    traced: Sequence[TracedBlock],
    options: PipelineConfig,
    rank_of_stage: Sequence[int],
    runtime: Runtime,
    pipeline_group: Communicator,
    autocast: Callable[[], AbstractContextManager[Any]],
    saved: Sequence[str] | None = None,
) -> Split:
    """Splits a model as configured, as a resumed run was, or by measured times; all ranks call it together.

    A resumed run keeps its split. Times differ from start to start, and another split may add up the norm of the
    gradient in another order, so that the run would not go on bit for bit.

    Args:
        model: The whole model.
        example: This rank's inputs of a batch. Rank 0 times the blocks on a part of them.
        traced: What each block hands over.
        options: The strategy's keys.
        rank_of_stage: The pipeline rank of each stage.
        runtime: Of the run.
        pipeline_group: The ranks of one pipeline.
        autocast: Context of forward passes.
        saved: The boundaries that a checkpoint says the resumed run has; the same on all ranks.

    Raises:
        ConfigError: A stage would begin after a block whose output can't be sent.
    """
    names = [name for name, _ in named_blocks(model)]
    everyone = runtime.communicator()
    cuts = agreed(everyone, runtime, lambda: possible_cuts(model, traced, options))
    kept = None if options.boundaries or saved is None else starts_of(saved, names, cuts, options.stages)
    # As large as the schedule's microbatches, and at least two samples, which BatchNorm needs.
    size = max(2, len(example) // options.microbatches)
    costs: list[BlockCost] = agreed(
        everyone, runtime, lambda: measure_blocks(model, example[:size], autocast) if runtime.is_main else []
    )
    link = measure_point_to_point(pipeline_group, runtime.device)
    measured = {"costs": [asdict(cost) for cost in costs], "link": link}
    of_rank_0 = everyone.all_gather_json(measured, runtime.device)[0]
    costs = [BlockCost(**cost) for cost in of_rank_0["costs"]]
    latency_ms, ms_per_byte = of_rank_0["link"]
    if options.boundaries:
        starts = [0, *(names.index(name) for name in options.boundaries)]
    elif kept is not None:
        starts = kept
        log.info("split of the checkpoint: stages begin with %s", ", ".join(names[start] for start in starts))
    else:
        if saved is not None:
            log.info("the split of the checkpoint is not one into %d stages of this model: chosen anew", options.stages)
        compute_ms = [cost.forward_ms + cost.backward_ms for cost in costs]
        # An activation is sent, and its gradient comes back.
        transfer_ms = [2 * (latency_ms * cost.output_tensors + ms_per_byte * cost.output_bytes) for cost in costs]
        starts = linear_partition(compute_ms, transfer_ms, options.stages, cuts)
    return Split(starts, _rows(costs, [block.output for block in traced], starts, rank_of_stage))


def starts_of(boundaries: Sequence[str], names: Sequence[str], cuts: Sequence[int], stages: int) -> list[int] | None:
    """Index of each stage's first block, by boundaries that may be wrong.

    Args:
        boundaries: First block of each stage but the first.
        names: Of the blocks.
        cuts: Indices of the blocks that a stage may begin with.
        stages: Number of stages.

    Returns:
        ``None`` if the boundaries don't split these blocks into so many stages.
    """
    index_of = {names[cut]: cut for cut in cuts}
    starts = [index_of.get(name, 0) for name in boundaries]
    if len(starts) != stages - 1 or starts != sorted({*starts} - {0}):
        return None
    return [0, *starts]


def _rows(
    costs: Sequence[BlockCost],
    outputs: Sequence[HandOver | None],
    starts: Sequence[int],
    rank_of_stage: Sequence[int],
) -> list[dict[str, Any]]:
    rows = []
    for stage, start in enumerate(starts):
        stop = starts[stage + 1] if stage + 1 < len(starts) else len(costs)
        blocks = costs[start:stop]
        sent = outputs[stop - 1] if stop < len(costs) else None
        rows.append(
            {
                "stage": stage,
                "rank": rank_of_stage[stage],
                "blocks": [cost.name for cost in blocks],
                "parameters": sum(cost.parameters for cost in blocks),
                "forward_ms": round(sum(cost.forward_ms for cost in blocks), 3),
                "backward_ms": round(sum(cost.backward_ms for cost in blocks), 3),
                "activation_mb": round(sum(cost.activation_bytes for cost in blocks) / 2**20, 3),
                "output_mb": round(blocks[-1].output_bytes / 2**20, 3),
                "sends_tensors": len(sent.tensors) if sent else 0,
                "sends_mb_per_sample": round(sent.sample_bytes / 2**20, 6) if sent else 0.0,
            }
        )
    return rows
