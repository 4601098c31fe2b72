"""Base class of distrain's models, and the protocol for models whose initial parameters depend on the data."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor, nn

from distrain import torch_internals

if TYPE_CHECKING:
    from distrain.data.base import Split


class BlockSequence(nn.Sequential):
    """A sequential model of named blocks.

    A pipeline may split the model between any two blocks. Parameters are named ``<block>.<layer>.<parameter>``; a slice
    of the model keeps the names of its blocks.

    Args:
        blocks: The blocks by name, in the order in which they run.
    """

    def __init__(self, blocks: Mapping[str, nn.Module]) -> None:
        super().__init__(OrderedDict(blocks))

    # Not redundant: torch.compile silently skips the forward method that nn.Sequential itself defines.
    def forward(self, input: Tensor) -> Tensor:
        """Maps images ``[N, C, H, W]`` to logits ``[N, num_classes]``; a slice maps between intermediate shapes."""
        for block in self:
            input = block(input)
        return input

    def __getitem__(self, idx: slice | int) -> Any:
        """Returns the block at an index, or a :class:`BlockSequence` that shares the blocks of a slice."""
        if isinstance(idx, slice):
            return BlockSequence(dict(list(self.named_children())[idx]))
        return super().__getitem__(idx)


def is_sequence(model: nn.Module) -> bool:
    """Whether a model does nothing but run its blocks, one after another, and holds no state itself."""
    if not isinstance(model, nn.Sequential) or "forward" in vars(model):
        return False
    if type(model).forward not in (nn.Sequential.forward, BlockSequence.forward):
        return False
    return not any("." not in name for name in (*model.state_dict(), *torch_internals.registered_names(model)))


@runtime_checkable
class DataDependentInit(Protocol):
    """A model whose initial parameters are computed from the training images.

    Any model class with this method satisfies the protocol.
    """

    def initialise_from(self, images: Split, mean: Sequence[float], std: Sequence[float]) -> None:
        """Sets the initial parameters; called once before training, while the model is on the CPU.

        Every rank calls it with the same arguments and must compute the same parameters.

        Args:
            images: The whole training split, not a rank's shard. The choice of images must be deterministic.
            mean: Channel means that normalise the model's input, for pixel values in [0, 1].
            std: Channel standard deviations, likewise.
        """
