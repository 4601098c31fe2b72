"""What strategies have in common whose ranks hold parts of layers: results count once, averages are parts too."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from distrain.communication.collectives import Communicator
from distrain.strategies.base import OptionsT_co, StepResult, Strategy
from distrain.strategies.tensor_parallel import divided_state, plan
from distrain.strategies.tensor_parallel.cut import Cut
from distrain.strategies.tensor_parallel.layer_group import LayerGroup
from distrain.strategies.tensor_parallel.layers import Division

if TYPE_CHECKING:
    from distrain.data.batch import Batch

log = logging.getLogger(__name__)


class DividedStrategy(Strategy[OptionsT_co]):
    """The first base class of a strategy that divides layers.

    Attributes:
        tensor_group: The ranks that hold the parts of the same layers.
    """

    tensor_group: Communicator
    _division: Mapping[str, Any] = MappingProxyType({})
    _cuts: dict[str, Cut]
    _layers: LayerGroup
    _bytes_of_layers = 0

    @override
    def train_step(self, batch: Batch) -> StepResult:
        before = self._layers.bytes_sent
        # The second base class has it.
        result = super().train_step(batch)  # type: ignore[safe-super]
        self._bytes_of_layers = self._layers.bytes_sent - before
        return self._counted_once(result)

    @override
    def eval_step(self, batch: Batch) -> StepResult:
        return self._counted_once(super().eval_step(batch))  # type: ignore[safe-super]

    def _note_divisions(self, model: nn.Module, divisions: Mapping[str, Division]) -> None:
        """Says, in the log and at the end of the run, what is divided; called before the model is."""
        log.info("%s", plan.describe(model, divisions, self.tensor_group.size))
        roles = {name: division.role for name, division in divisions.items()}
        self._division = {"divided": roles, "whole": list(plan.whole_layers(model, divisions))}

    @override
    def report(self) -> dict[str, Any]:
        return {**super().report(), "tensor_parallel": dict(self._division)}

    @override
    def uncompressed_bytes_per_step(self) -> int:
        return super().uncompressed_bytes_per_step() + self._bytes_of_layers

    def _counted_once(self, result: StepResult) -> StepResult:
        """A result that is equal on all ranks of the group, on the first alone: sums over ranks must count it once."""
        if self.tensor_group.rank == 0:
            return result
        sums = torch.zeros_like(result.loss_sum), torch.zeros_like(result.metric_sums)
        return StepResult(*sums, 0, skipped=result.skipped)

    def _share_wholes(self, tensors: Mapping[str, Tensor]) -> None:
        """Gives all ranks of the group the first one's values of what is whole, if they have come apart.

        Args:
            tensors: This rank's, by the unsplit model's names.
        """
        if divided_state.share_wholes(tensors, self._cuts, self.tensor_group, self.runtime.device):
            log.warning("the ranks' processors round differently: all take what is whole from the first of their group")

    @override
    def part_of(self, name: str, whole: Tensor) -> Tensor:
        cut = self._cuts.get(name)
        if cut is None:
            return whole
        divided_state.check_shape(name, whole.shape, cut)
        return cut.part(whole, self.tensor_group.rank)

    @override
    def saved_part(self, name: str, kept: Tensor) -> Tensor:
        return self._cuts[name].gather(kept, self.tensor_group) if name in self._cuts else kept

    @override
    def agree_on_average(self, average: Mapping[str, Tensor]) -> None:
        super().agree_on_average(average)
        self._share_wholes(average)
