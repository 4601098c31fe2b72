"""Measures a model whose layers are divided among ranks, as ``strategy=tensor_parallel`` does it, on one of them.

Every rank divides the layers as the first rank would, which has the most channels. What ranks would add up is counted
instead, so that steps show what a rank computes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from distrain.communication.collectives import Communicator
from distrain.config.schema import Config
from distrain.data.batch import Batch
from distrain.errors import ConfigError, config_error, described
from distrain.models.foreign import auxiliary_weight
from distrain.strategies.pipeline.block_costs import BlockCost, measure_blocks
from distrain.strategies.pipeline.blocks import named_blocks, part_of
from distrain.strategies.single import Single
from distrain.strategies.tensor_parallel import plan
from distrain.strategies.tensor_parallel.cut import model_format
from distrain.strategies.tensor_parallel.layer_group import LayerGroup
from distrain.strategies.tensor_parallel.layers import Division, divide
from distrain.strategies.tensor_parallel.options import TensorParallelConfig
from distrain.strategies.trial_copy import trial_copy
from distrain.tools.planning import candidates
from distrain.tools.planning.cluster import Cluster
from distrain.tools.planning.step_timer import StepTimer, StepTimes
from distrain.tools.planning.steps.common import setting_of
from distrain.tools.planning.structure import looked_at, memory_of, structures
from distrain.tools.planning.workload import DividedModel, Workload, at

#: Times that each block's passes are timed, where they are not long.
_REPEATS = 5


@dataclass(frozen=True)
class Divisions:
    """A training whose layers are to be divided.

    Attributes:
        config: Of the training with ``strategy=tensor_parallel``.
        strategies: Names of the strategies to look at.
        described: A cluster that isn't here; ``None``: the ranks that measure.
    """

    config: Config
    strategies: Sequence[str]
    described: Cluster | None

    @property
    def needs_times(self) -> bool:
        """Whether times are those that are measured, and not those of a device that isn't here."""
        return self.described is None or self.described.accelerator is None

    def wanted(self, workload: Workload, cluster: Cluster) -> list[tuple[int, list[int]]]:
        """The ways of dividing layers that configurations of the plan have.

        Args:
            workload: The training as it was measured.
            cluster: The ranks that measure.

        Returns:
            Numbers of ranks that divide layers, each with the index of the first block of each pipeline stage.
        """
        cluster = self.described or cluster
        if cluster.accelerator is not None:
            workload = workload.on(cluster.accelerator)
        return candidates.divisions(setting_of(workload, cluster), self.strategies)


class CountingGroup(LayerGroup):
    """The ranks among which layers are divided, of which only the first one is there.

    Args:
        ranks: Their number.
        layout: As for :class:`LayerGroup`.

    Attributes:
        counted: Bytes of each tensor that the ranks would have added up.
    """

    def __init__(self, ranks: int, layout: torch.memory_format = torch.contiguous_format) -> None:
        super().__init__(Communicator(), layout=layout)
        self._ranks = ranks
        self.counted: list[int] = []

    @property
    @override
    def size(self) -> int:
        return self._ranks

    @override
    def sum(self, tensor: Tensor) -> Tensor:
        self.counted.append(tensor.nbytes)
        return tensor.contiguous(memory_format=self.layout_of(tensor.dim()))


@dataclass(frozen=True)
class DividedLayers:
    """A model of which the first rank has its part.

    Attributes:
        group: The ranks.
        sequence: The model as a sequence of blocks.
        starts: Index of the first block of each stage, in one of which lies what is divided together.
        joined: First and last block of layers that are divided together and lie in several blocks.
    """

    group: CountingGroup
    sequence: nn.Sequential
    starts: tuple[int, ...]
    joined: frozenset[tuple[int, int]]

    def holds_for(self, ranks: int, starts: Sequence[int]) -> bool:
        """Whether so many ranks would divide the same layers for other stages."""
        together = len(self.starts) == 1 or tuple(starts) == self.starts
        cut = any(first < start <= last for start in starts for first, last in self.joined)
        return self.group.size == ranks and together and not cut


def divide_model(
    config: Config,
    ranks: int,
    starts: Sequence[int],
    strategy: Single,
    model: nn.Module,
    sequence: nn.Sequential,
    example: Tensor,
    *,
    needs_values: bool = True,
) -> DividedLayers:
    """Leaves of a model what the first rank has of it.

    Args:
        config: Says how layers are divided.
        ranks: Among which they are.
        starts: Index of the first block of each pipeline stage.
        strategy: Trains the model.
        model: The whole model.
        sequence: The same as a sequence of blocks, which have its modules.
        example: Inputs ``[N, …]``.
        needs_values: As for :func:`structures`.

    Raises:
        ConfigError: So many ranks can't divide it.
    """
    options = cast(TensorParallelConfig, config.strategy)
    count = len(named_blocks(sequence))
    modules = dict(model.named_modules())

    def homes(bounds: Sequence[int]) -> list[set[str]]:
        parts = [part_of(sequence, *pair) for pair in itertools.pairwise(bounds)]
        return [{name for name, module in part.named_modules() if modules.get(name) is module} for part in parts]

    blocks, stages = homes(range(count + 1)), homes([*starts, count])
    joined: set[tuple[int, int]] = set()

    def together(names: Collection[str]) -> bool:
        used = [index for name in names for index, home in enumerate(blocks) if name in home]
        # A module that is in no block is made of several.
        span = (min(used), max(used)) if len(used) == len(names) else (0, count - 1)
        if span[0] < span[1]:
            joined.add(span)
        return len(starts) == 1 or any(home.issuperset(names) for home in stages)

    plan.check_patterns(options, model)
    auxiliary = auxiliary_weight(config.model) > 0

    def find(whole: nn.Module, inputs: Tensor) -> dict[str, Division]:
        joined.clear()
        return plan.find_divisions(
            whole, inputs, strategy.precision, options, ranks, auxiliary=auxiliary, together=together
        )

    divisions = looked_at(model, example, strategy.precision, find, needs_values=needs_values)
    group = CountingGroup(ranks, model_format(model))
    divide(model, divisions, group)
    for name in divisions:
        _replace(sequence, modules[name], model.get_submodule(name))
    try:
        with trial_copy(sequence) as trial, strategy.precision.autocast(), torch.no_grad():
            trial(example)
    except Exception as error:  # a user's forward may raise anything
        if len(starts) > 1:
            raise config_error("strategy.plan", f"divided blocks fail by themselves ({described(error)})") from error
        # Nothing is known of them by themselves, so that no stage may begin with one of them.
        sequence, joined = nn.Sequential(model), {(0, count - 1)}
    return DividedLayers(group, sequence, tuple(starts), frozenset(joined))


def _replace(sequence: nn.Module, module: nn.Module, other: nn.Module) -> None:
    """Puts a module in the place of another one, if that is another one."""
    if module is not other:
        for parent in [*sequence.modules()]:
            for key in [key for key, child in parent.named_children() if child is module]:
                setattr(parent, key, other)


def measure_each(
    wanted: Iterable[tuple[int, Sequence[int]]],
    measure: Callable[[int, Sequence[int]], tuple[DividedLayers, DividedModel]],
) -> tuple[tuple[DividedModel, ...], list[str]]:
    """Measures a model in each way of dividing its layers, once if stages make no difference.

    Args:
        wanted: As :meth:`Divisions.wanted` returns it; the same on all ranks.
        measure: Measures one way. A :class:`ConfigError` says that it isn't possible.

    Returns:
        What was measured, and why the rest wasn't.
    """
    known: list[tuple[DividedLayers, DividedModel]] = []
    found: list[DividedModel] = []
    remarks: dict[int, str] = {}
    for ranks, starts in wanted:
        same = next((measured for layers, measured in known if layers.holds_for(ranks, starts)), None)
        if same is not None:
            found.append(dataclasses.replace(same, starts=tuple(starts)))
        elif ranks not in remarks:
            try:
                known.append(measure(ranks, starts))
            except ConfigError as error:
                where = f" of {len(starts)} stages" if len(starts) > 1 else ""
                remarks[ranks] = f"no layers{where} are divided among {ranks} ranks: {error}"
            else:
                found.append(known[-1][1])
    return tuple(found), [*remarks.values()]


def measure_divided(
    layers: DividedLayers, strategy: Single, whole: Workload, timer: StepTimer, batch: Batch
) -> DividedModel:
    """Measures steps of a divided model; all ranks call it together.

    Args:
        layers: The model.
        strategy: Trains it.
        whole: The training of the whole model, as it was measured.
        timer: Of this strategy.
        batch: Of as many samples as the measured steps have.
    """
    samples = len(batch)
    # The first two steps, which make memory and kernels of other shapes, take up to twice as long as the next one.
    timer.first_steps(samples)
    steps = timer.steps(samples, update=0.0)
    # The steps have made what the update needs: gradients and state.
    update = timer.agree(timer.update_seconds())
    steps = dataclasses.replace(steps, passes=max(steps.passes - update, 0.0))
    costs, sums = _costs(layers, strategy, steps, batch.inputs)
    found = structures(layers.sequence, batch.inputs, strategy.precision, needs_values=not steps.is_long)
    measured = sum(cost.forward_ms + cost.backward_ms for cost in costs)
    # What a block takes alone differs from its part of a whole pass.
    scale = steps.passes / max(timer.agree(measured), 1e-6)
    # Of blocks that fail by themselves, nothing is known but their sum.
    wholes = whole.blocks if len(found) > 1 else whole.blocks[-1:]
    blocks = []
    for index, (cost, structure, (forward, backward)) in enumerate(zip(costs, found, sums, strict=True)):
        of_whole = wholes[index]
        block = structure.profile(
            of_whole.name,
            _by_samples(of_whole.forward, samples, scale * cost.forward_ms),
            _by_samples(of_whole.backward, samples, scale * cost.backward_ms),
            memory_of(index, {samples: found}, {}),
        )
        block = dataclasses.replace(
            block,
            # Where a stage ends activations are whole.
            output_bytes=of_whole.output_bytes,
            output_tensors=of_whole.output_tensors,
            begins_stage=of_whole.begins_stage,
            forward_sums=tuple(size / samples for size in forward),
            backward_sums=tuple(size / samples for size in backward),
        )
        blocks.append(block)
    state, needed = float(timer.optimizer_bytes()), float(timer.update_bytes())
    return DividedModel(layers.group.size, tuple(blocks), update, state, needed, layers.starts)


def _by_samples(whole: Mapping[int, float], samples: int, seconds: float) -> dict[int, float]:
    """Seconds of a pass by number of samples, of which one is measured: the others as with whole layers."""
    share = seconds / max(at(whole, samples), 1e-9)
    return {**{size: share * at(whole, size) for size in whole if size < samples}, samples: seconds}


#: Bytes of the tensors that are added up in a block's forward and in its backward pass.
_Sums = tuple[list[int], list[int]]


def _costs(
    layers: DividedLayers, strategy: Single, steps: StepTimes, inputs: Tensor
) -> tuple[list[BlockCost], list[_Sums]]:
    """Times each block, and counts what is added up."""
    group = layers.group
    blocks = [block for _, block in named_blocks(layers.sequence)]
    sums: list[_Sums] = [([], []) for _ in blocks]

    def counting_in(counted: list[int]) -> Callable[..., None]:
        def begin(*_: object) -> None:
            counted.clear()
            group.counted = counted

        return begin

    handles: list[RemovableHandle] = []
    try:
        for block, (forward, backward) in zip(blocks, sums, strict=True):
            handles.append(block.register_forward_pre_hook(counting_in(forward)))
            # A block's backward pass follows, before the next block begins.
            handles.append(block.register_forward_hook(counting_in(backward)))
        autocast, is_long = strategy.precision.autocast, steps.is_long
        costs = measure_blocks(layers.sequence, inputs, autocast, 1 if is_long else _REPEATS, warm_up=not is_long)
    finally:
        for handle in handles:
            handle.remove()
        group.counted = []
    return costs, sums
