"""What a model is: blocks in a row, and initial parameters that may depend on the training images."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor, nn

if TYPE_CHECKING:
    from distrain.data.base import Images


class BlockSequence(nn.Sequential):
    """A model whose named children run one after the other.

    Each child is a block: a pipeline may split the model between any two of them. Parameters are named
    ``<block>.<layer>.<parameter>``, and a slice of the model keeps the names of its blocks.
    """

    def __init__(self, blocks: Mapping[str, nn.Module]) -> None:
        super().__init__(OrderedDict(blocks))

    # Not redundant: torch.compile skips the forward that a bare nn.Sequential defines, and says nothing.
    def forward(self, input: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` to logits ``[N, num_classes]``, or what lies between where the sequence is a part."""
        for block in self:
            input = block(input)
        return input

    def __getitem__(self, idx: slice | int) -> Any:
        """The block at a position, or the blocks of a slice as a :class:`BlockSequence` that shares them."""
        if isinstance(idx, slice):
            return BlockSequence(dict(list(self.named_children())[idx]))
        return super().__getitem__(idx)


@runtime_checkable
class DataDependentInit(Protocol):
    """A model with initial parameters that come from the training images; any class with this method is one."""

    def initialise_from(self, images: Images, mean: Sequence[float], std: Sequence[float]) -> None:
        """Called once before training, on the CPU, on every rank with the same: the whole split, not a rank's share.

        Args:
            images: The training images. What is taken of them must not depend on chance.
            mean: Channel means that the model's input is normalised with, in [0, 1].
            std: Channel standard deviations, likewise.
        """
