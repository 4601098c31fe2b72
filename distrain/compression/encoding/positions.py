"""Which elements of a tensor a message is about, written in few bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distrain.compression.encoding.bits import pack_bits, packed_size, unpack_bits


@dataclass(frozen=True)
class PositionCode:
    """How a set of positions is written; its size depends on two numbers that sender and receiver know.

    A position's ``low_bits`` low bits are written as they are. The high ones never fall from one position to the next,
    so they are written in unary: a one for each position, and a zero each time that the high part grows by one. With no
    low bits the positions differ in their high part and a plain bitmap says the same in less. This is the code of Elias
    1974 ("Efficient Storage and Retrieval by Content and Address of Static Files") and Fano 1971, with the low bits at
    whole and half bytes only; at 5 % it takes 6.3 bits a position, at 1 % 9.4, where 5.7 and 8.1 is the least possible.

    Attributes:
        count: How many positions.
        size: They are below this.
        low_bits: 0, 4 or 8.
    """

    count: int
    size: int
    low_bits: int

    @classmethod
    def shortest(cls, count: int, size: int) -> PositionCode:
        """The code that takes the fewest bytes."""
        return min((cls(count, size, low_bits) for low_bits in (0, 4, 8)), key=lambda code: sum(code.bytes))

    @property
    def bytes(self) -> tuple[int, int]:
        """Sizes of the two parts: low bits, and high parts. Nothing is written where all positions are meant."""
        if self.count == self.size:
            return 0, 0
        return packed_size(self.count, self.low_bits), packed_size(self._marks, 1)

    @property
    def _marks(self) -> int:
        groups = -(-self.size >> self.low_bits)
        return groups + self.count if self.low_bits else groups

    def write(self, positions: Tensor) -> list[Tensor]:
        """The two parts, uint8.

        Args:
            positions: int64 ``[count]``, ascending, without repetition.
        """
        none = positions.new_empty(0, dtype=torch.uint8)
        if self.count == self.size:
            return [none, none]
        if self.low_bits:
            low = pack_bits((positions & ((1 << self.low_bits) - 1)).to(torch.uint8), self.low_bits)
            marked = (positions >> self.low_bits).add_(torch.arange(self.count, device=positions.device))
        else:
            low, marked = none, positions
        marks = torch.zeros(self._marks, dtype=torch.bool, device=positions.device)
        return [low, pack_bits(marks.index_fill_(0, marked, True), 1)]

    def read(self, low: Tensor, high: Tensor) -> Tensor:
        """The positions, int64 ``[count]``, ascending.

        Raises:
            ValueError: The message tells another number of positions.
        """
        if self.count == self.size:
            return torch.arange(self.size, device=high.device)
        marked = unpack_bits(high, 1, self._marks).nonzero().view(-1)
        if len(marked) != self.count:
            raise ValueError(f"a message tells {len(marked)} positions where {self.count} were expected")
        if not self.low_bits:
            return marked
        groups = marked.sub_(torch.arange(self.count, device=high.device))
        return groups.mul_(1 << self.low_bits).add_(unpack_bits(low, self.low_bits, self.count))
