"""Which part of a tensor each rank has."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distrain.communication.collectives import Communicator
from distrain.data.sampler import part_sizes


def channel_sizes(channels: int, blocks: int, ranks: int) -> list[int]:
    """How many channels each rank has, if they are divided between blocks of equal size only.

    Args:
        channels: All channels; a multiple of ``blocks``.
        blocks: Number of blocks: attention heads, say, or the groups of a GroupNorm.
        ranks: Number of ranks. Where it doesn't divide the blocks, the first ranks have one more.
    """
    return [size * (channels // blocks) for size in part_sizes(blocks, ranks)]


def _ranges(sizes: list[int], start: int) -> list[tuple[int, int]]:
    bounds = itertools.pairwise(itertools.accumulate(sizes, initial=start))
    return list(bounds)


@dataclass(frozen=True)
class Cut:
    """How a tensor is cut along one dimension into a part for each rank.

    Attributes:
        shape: Of the whole tensor.
        dim: The dimension.
        ranges: For each rank the half-open ranges of indices that it has, in the order in which its part holds them.
    """

    shape: torch.Size
    dim: int
    ranges: tuple[tuple[tuple[int, int], ...], ...]

    @classmethod
    def even(cls, tensor: Tensor, dim: int, blocks: int, ranks: int, repeats: int = 1) -> Cut:
        """A cut between blocks.

        Args:
            tensor: The whole tensor.
            dim: The dimension.
            blocks: Number of blocks that stay whole, as for :func:`channel_sizes`.
            ranks: Number of ranks.
            repeats: The dimension holds so many tensors one after the other, each of which is cut: 3 for queries, keys
                and values in one weight.
        """
        length = tensor.shape[dim] // repeats
        sizes = channel_sizes(length, blocks, ranks)
        of_each = [_ranges(sizes, index * length) for index in range(repeats)]
        return cls(tensor.shape, dim, tuple(tuple(ranges) for ranges in zip(*of_each, strict=True)))

    def part_shape(self, rank: int) -> torch.Size:
        """Shape of a rank's part."""
        sizes = list(self.shape)
        sizes[self.dim] = sum(stop - start for start, stop in self.ranges[rank])
        return torch.Size(sizes)

    def part(self, whole: Tensor, rank: int) -> Tensor:
        """A copy of a rank's part; a channels-last tensor remains one."""
        pieces = [whole.narrow(self.dim, start, stop - start) for start, stop in self.ranges[rank]]
        return torch.cat(pieces, self.dim).contiguous(memory_format=memory_format(whole))

    def gather(self, part: Tensor, group: Communicator) -> Tensor:
        """The whole tensor of the ranks' parts; all ranks call it together, and all get it."""
        lengths = [self.part_shape(rank)[self.dim] for rank in range(group.size)]
        padded_shape = list(part.shape)
        padded_shape[self.dim] = max(lengths)
        padded = part.new_zeros(padded_shape)
        padded.narrow(self.dim, 0, lengths[group.rank]).copy_(part)
        whole = part.new_empty(self.shape)
        for gathered, ranges in zip(group.all_gather(padded), self.ranges, strict=True):
            offset = 0
            for start, stop in ranges:
                piece = gathered.narrow(self.dim, offset, stop - start)
                whole.narrow(self.dim, start, stop - start).copy_(piece)
                offset += stop - start
        return whole


def memory_format(tensor: Tensor) -> torch.memory_format:
    """Whether a tensor is stored channels-last and in no other way."""
    is_channels_last = tensor.dim() == 4 and not tensor.is_contiguous()
    is_channels_last = is_channels_last and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_channels_last else torch.contiguous_format


def model_format(model: nn.Module) -> torch.memory_format:
    """How whole images' activations of a model are stored on all ranks."""
    formats = {memory_format(parameter) for parameter in model.parameters()}
    return torch.channels_last if torch.channels_last in formats else torch.contiguous_format
