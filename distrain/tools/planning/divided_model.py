"""Measures a model whose layers are divided among ranks, as ``strategy=tensor_parallel`` does it, on one of them.

Every rank divides the layers as the first rank would, which has the most channels. What ranks would add up is counted
instead, so that steps show what a rank computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from distrain.communication.collectives import Communicator
from distrain.config.schema import Config
from distrain.data.batch import Batch
from distrain.models.foreign import auxiliary_weight
from distrain.strategies.single import Single
from distrain.strategies.tensor_parallel import plan
from distrain.strategies.tensor_parallel.cut import model_format
from distrain.strategies.tensor_parallel.layer_group import LayerGroup
from distrain.strategies.tensor_parallel.layers import divide
from distrain.strategies.tensor_parallel.options import TensorParallelConfig
from distrain.tools.planning.step_timer import StepTimer
from distrain.tools.planning.structure import structures
from distrain.tools.planning.workload import BlockMemory, BlockProfile, DividedModel


@dataclass(frozen=True)
class Division:
    """A training with ``strategy=tensor_parallel`` to be planned.

    Attributes:
        config: Of the training.
        ranks: Among which layers are divided.
    """

    config: Config
    ranks: int


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


def divide_model(division: Division, strategy: Single, model: nn.Module, example: Tensor) -> CountingGroup:
    """Leaves of a model what the first rank has of it.

    Args:
        division: Among how many ranks, and how.
        strategy: Trains the model.
        model: The whole model.
        example: Inputs ``[N, …]``.

    Raises:
        ConfigError: So many ranks can't divide it.
    """
    options = cast(TensorParallelConfig, division.config.strategy)
    auxiliary = auxiliary_weight(division.config.model) > 0
    plan.check_patterns(options, model)
    divisions = plan.find_divisions(model, example, strategy.precision, options, division.ranks, auxiliary=auxiliary)
    group = CountingGroup(division.ranks, model_format(model))
    divide(model, divisions, group)
    return group


def measure_divided(
    division: Division, strategy: Single, group: CountingGroup, timer: StepTimer, batch: Batch
) -> DividedModel:
    """Measures steps of a divided model; all ranks call it together.

    Args:
        division: Among how many ranks.
        strategy: Trains the divided model.
        group: As :func:`divide_model` returned it.
        timer: Of this strategy.
        batch: Of as many samples as the measured steps have.
    """
    samples = len(batch)
    # Passes of the set-up may have been counted. The step also makes what the update needs: gradients and state.
    group.counted.clear()
    strategy.train_step(batch)
    sums = tuple(size / samples for size in group.counted)
    update = timer.agree(timer.update_seconds())
    steps = timer.steps(samples, update)
    whole = nn.Sequential(strategy.model)
    (found,) = structures(whole, batch.inputs, strategy.precision, needs_values=not steps.is_long)
    block = BlockProfile(
        "model",
        found.gradients,
        # Only the sum of both is known, and matters.
        {samples: steps.passes / 3},
        {samples: steps.passes * 2 / 3},
        found.saved_bytes,
        flops=found.flops,
        batchnorms=found.batchnorms,
        state_bytes=found.state_bytes,
        kernels=found.kernels,
        memory={"plain": BlockMemory(found.saved_bytes, {samples: float(found.extra_bytes)})},
    )
    return DividedModel(
        division.ranks, block, sums, update, float(timer.optimizer_bytes()), float(timer.update_bytes())
    )
