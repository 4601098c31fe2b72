"""Small numbers as bytes: the layout, written down a second time, and the way back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from distrain.compression.encoding.bits import pack_bits, packed_size, unpack_bits

WIDTHS = (1, 2, 4, 8)
#: Around every multiple that matters, and none.
SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 513, 4096)


def codes(bits: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("count", SIZES)
def test_unpacking_restores_what_was_packed(bits: int, count: int) -> None:
    original = codes(bits, count)
    packed = pack_bits(original, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_size(count, bits) == -(-count * bits // 8)
    assert torch.equal(unpack_bits(packed, bits, count), original)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("count", SIZES)
def test_byte_i_holds_the_ith_number_of_each_run(bits: int, count: int) -> None:
    original, length = codes(bits, count), packed_size(count, bits)
    expected = [0] * length
    for position, code in enumerate(original.tolist()):
        expected[position % length] |= code << (bits * (position // length))
    assert pack_bits(original, bits).tolist() == expected


@pytest.mark.parametrize("count", [8, 4096])
def test_single_bits_agree_with_numpy_across_runs(count: int) -> None:
    original = codes(1, count)
    expected = np.packbits(original.view(8, -1).numpy(), axis=0, bitorder="little")
    assert pack_bits(original, 1).tolist() == expected.ravel().tolist()


def test_unused_bits_are_zero() -> None:
    assert pack_bits(torch.full((3,), 3, dtype=torch.uint8), 2).tolist() == [0b00111111]


def test_booleans_are_packed_as_single_bits() -> None:
    flags = torch.tensor([True, False, True, True, False])
    packed = pack_bits(flags, 1)
    assert packed.tolist() == [0b01101]
    assert torch.equal(unpack_bits(packed, 1, 5).bool(), flags)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_higher_bits_of_a_number_do_not_reach_its_neighbours(bits: int) -> None:
    original = codes(8, 100)
    assert torch.equal(pack_bits(original, bits), pack_bits(original & ((1 << bits) - 1), bits))


@pytest.mark.parametrize("bits", WIDTHS)
def test_rows_are_packed_separately(bits: int) -> None:
    original = codes(bits, 2, 3, 13)
    packed = pack_bits(original, bits)
    assert packed.shape == (2, 3, packed_size(13, bits))
    assert torch.equal(packed[1, 2], pack_bits(original[1, 2], bits))
    assert torch.equal(unpack_bits(packed, bits, 13), original)


def test_packing_does_not_change_its_input() -> None:
    for bits in WIDTHS:
        original = codes(bits, 64)
        before = original.clone()
        packed = pack_bits(original, bits)
        packed.zero_()
        assert torch.equal(original, before)
