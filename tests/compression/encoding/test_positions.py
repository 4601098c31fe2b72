"""Positions come back as they were written, in about as few bits as can be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distrain.compression.encoding.positions import PositionCode

SIZES = [1, 2, 7, 8, 15, 16, 17, 255, 256, 257, 4096, 20_001]
CODES = [0, 4, 8]


def some(count: int, size: int) -> Tensor:
    """Random positions, ascending."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(count))[:count].sort().values


@pytest.mark.parametrize("low_bits", CODES)
@pytest.mark.parametrize("size", SIZES)
def test_reading_restores_what_was_written(size: int, low_bits: int) -> None:
    for count in {1, max(1, size // 100), max(1, size // 3), max(1, size - 1), size}:
        code = PositionCode(count, size, low_bits)
        for positions in (some(count, size), torch.arange(count), torch.arange(size - count, size)):
            written = code.write(positions)
            assert [part.dtype for part in written] == [torch.uint8] * 2
            assert tuple(map(len, written)) == code.bytes
            assert torch.equal(code.read(*written), positions)


def test_empty_tensor_has_an_empty_code() -> None:
    code = PositionCode.shortest(0, 0)
    assert code.bytes == (0, 0)
    assert code.read(*code.write(torch.empty(0, dtype=torch.int64))).tolist() == []


@pytest.mark.parametrize(
    ("density", "bits", "low_bits"), [(0.001, 13, 8), (0.01, 9.4, 8), (0.05, 6.3, 4), (0.25, 4, 0), (1, 0, 0)]
)
def test_shortest_code_is_chosen(density: float, bits: float, low_bits: int) -> None:
    count, size = round(density * 1_000_000), 1_000_000
    code = PositionCode.shortest(count, size)
    assert code.low_bits == low_bits
    assert 8 * sum(code.bytes) / count <= bits
    # Never longer than a bitmap, nor than 16 bits a position, which others send at 5 %.
    assert sum(code.bytes) <= size / 8


def test_message_with_wrong_number_of_positions_is_refused() -> None:
    code = PositionCode(5, 1000, 8)
    low, high = code.write(some(5, 1000))
    with pytest.raises(ValueError, match="a message holds 0 positions where 5 were expected"):
        code.read(low, torch.zeros_like(high))
