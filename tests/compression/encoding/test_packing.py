"""Several tensors as one message and back."""

from __future__ import annotations

import pytest
import torch

from distrain.compression.encoding.packing import pack, unpack


def test_parts_of_any_dtype_are_restored_in_order() -> None:
    parts = [
        torch.tensor([1.5, -2.5, 3.5]),
        torch.tensor([7], dtype=torch.uint8),
        torch.tensor([2**40, -1]),
        torch.tensor([0.1], dtype=torch.float64),
        torch.tensor([1.0, 2.0, 4.0], dtype=torch.bfloat16),
    ]
    packed = pack(parts)
    assert packed.dtype == torch.uint8
    found = unpack(packed, [(part.dtype, part.numel()) for part in parts])
    assert [part.dtype for part in found] == [part.dtype for part in parts]
    assert all(torch.equal(part, original) for part, original in zip(found, parts, strict=True))


def test_every_part_starts_at_a_multiple_of_eight_bytes() -> None:
    parts = [torch.ones(3, dtype=torch.uint8), torch.ones(3), torch.ones(2, dtype=torch.float64)]
    packed = pack(parts)
    assert packed.tolist()[:8] == [1, 1, 1, 0, 0, 0, 0, 0]
    assert len(packed) == 8 + 16 + 16


def test_parts_may_be_empty() -> None:
    packed = pack([torch.empty(0), torch.tensor([5], dtype=torch.uint8), torch.empty(0, dtype=torch.int64)])
    first, middle, last = unpack(packed, [(torch.float32, 0), (torch.uint8, 1), (torch.int64, 0)])
    assert (len(first), middle.tolist(), len(last)) == (0, [5], 0)


def test_parts_are_views_of_the_message() -> None:
    packed = pack([torch.tensor([1.0, 2.0])])
    unpack(packed, [(torch.float32, 2)])[0].fill_(3)
    assert unpack(packed, [(torch.float32, 2)])[0].tolist() == [3, 3]


@pytest.mark.parametrize("count", [0, 2, 300])
def test_message_of_wrong_size_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"a message of 16 bytes should have {-(-count * 4 // 8) * 8}"):
        unpack(pack([torch.zeros(4)]), [(torch.float32, count)])
