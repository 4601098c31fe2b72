"""Parts, layout and size of a bucket of gradients."""

from __future__ import annotations

import torch

from distrain.compression.bucket import Bucket


def made() -> Bucket:
    """A channels-last weight and a matrix to compress, and a bias to send uncompressed."""
    flat = torch.arange(30.0)
    weight = flat[:16].as_strided((2, 2, 2, 2), (8, 1, 4, 2))
    return Bucket(flat, {"weight": weight, "matrix": flat[16:25].view(3, 3), "bias": flat[25:]}, uncompressed_numel=5)


def test_bytes_depend_on_elements_and_dtype() -> None:
    assert Bucket(torch.zeros(3), {}).bytes == 12
    assert Bucket(torch.zeros(3, dtype=torch.float64), {}).bytes == 24


def test_parts_are_views_of_the_bucket() -> None:
    bucket = made()
    bucket.compressed_part.zero_()
    bucket.uncompressed_part.fill_(1)
    assert bucket.flat.tolist() == [0.0] * 25 + [1.0] * 5
    bucket.compressed_tensors["matrix"].fill_(2)
    assert bucket.tensors["matrix"].eq(2).all()
    assert list(bucket.compressed_tensors) == ["weight", "matrix"]


def test_clone_has_the_same_content_and_layout_in_new_memory() -> None:
    bucket = made()
    copy = bucket.clone()
    assert copy.uncompressed_numel == 5
    for name, tensor in bucket.tensors.items():
        assert torch.equal(copy.tensors[name], tensor)
        assert copy.tensors[name].stride() == tensor.stride()
    bucket.flat.zero_()
    assert torch.equal(copy.flat, torch.arange(30.0))


def test_zeros_like_compressed_has_the_layout_of_the_compressed_part() -> None:
    bucket = made()
    zeros = bucket.zeros_like_compressed()
    assert zeros.flat.tolist() == [0.0] * 25
    assert zeros.uncompressed_numel == 0
    assert {name: tensor.stride() for name, tensor in zeros.tensors.items()} == {
        "weight": (8, 1, 4, 2),
        "matrix": (3, 1),
    }
