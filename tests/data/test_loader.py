from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from distrain.data.base import IGNORED, DataSpec, Images, assemble
from distrain.data.batch import Batch
from distrain.data.loader import Loader, prefetch_depth
from tests.data.helpers import augment, data_config, random_images

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
CPU = torch.device("cpu")
IMAGES = random_images(103)


def loader(images: Images = IMAGES, **changes: Any) -> Loader:
    settings: dict[str, Any] = {
        "batch_size": 16,
        "shard": (0, 1),
        "mean": MEAN,
        "std": STD,
        "device": CPU,
        "dtype": torch.float32,
        "memory_format": torch.contiguous_format,
    }
    return Loader(images, **{**settings, **changes})


def normalised(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (pixels.double() / 255 - mean) / std


def sample_indices(batches: list[Batch]) -> list[int]:
    return [int(i) for batch in batches for i in batch.indices]


def test_an_epoch_yields_every_sample_once_with_a_smaller_last_batch() -> None:
    one = loader(shuffle=True)
    batches = list(one.epoch(0))
    assert len(one) == len(batches) == 7
    assert [len(batch.targets) for batch in batches] == [16] * 6 + [7]
    assert [batch.global_count for batch in batches] == [16] * 6 + [7]
    assert sorted(sample_indices(batches)) == list(range(103))
    assert sample_indices(list(one.epoch(1))) != sample_indices(batches)
    assert sample_indices(list(loader().epoch(0))) == list(range(103))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 2e-3)],
)
@pytest.mark.parametrize("mapped", [False, True])
def test_images_are_normalised_and_stay_with_their_labels(
    memory_format: torch.memory_format, dtype: torch.dtype, tolerance: float, mapped: bool
) -> None:
    images = Images(IMAGES.images, IMAGES.targets, torch.arange(103)) if mapped else IMAGES
    for batch in loader(images, dtype=dtype, memory_format=memory_format, shuffle=True).epoch(0):
        assert batch.inputs.dtype == dtype
        assert batch.inputs.is_contiguous(memory_format=memory_format)
        assert batch.targets.equal(IMAGES.targets[batch.indices])
        expected = normalised(IMAGES.images[batch.indices])
        torch.testing.assert_close(batch.inputs.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shards", [2, 3, 20])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_shards_of_a_batch_are_together_the_global_batch_bit_for_bit(
    shards: int, memory_format: torch.memory_format
) -> None:
    settings: dict[str, Any] = {
        "shuffle": True,
        "seed": 3,
        "memory_format": memory_format,
        "augment": augment(flip=True, crop_padding=2, cutout=3),
    }
    whole = list(loader(**settings).epoch(1))
    parts = [list(loader(shard=(index, shards), **settings).epoch(1)) for index in range(shards)]
    for step, batch in enumerate(whole):
        shares = [part[step] for part in parts]
        assert all(share.global_count == batch.global_count for share in shares)
        assert torch.cat([share.inputs for share in shares]).equal(batch.inputs)
        assert torch.cat([share.targets for share in shares]).equal(batch.targets)
        assert torch.cat([share.indices for share in shares]).equal(batch.indices)


@pytest.mark.parametrize("consumed", [0, 16, 32, 37, 102, 103])
def test_an_epoch_continues_at_any_sample_with_any_batch_size(consumed: int) -> None:
    whole = sample_indices(list(loader(shuffle=True).epoch(2)))
    rest = list(loader(shuffle=True, batch_size=10).epoch(2, consumed))
    assert sample_indices(rest) == whole[consumed:]
    assert all(batch.global_count == 10 for batch in rest[:-1])


def test_augmentation_depends_on_the_sample_not_the_batch() -> None:
    settings: dict[str, Any] = {"augment": augment(flip=True, crop_padding=2, cutout=3), "seed": 7}
    shuffled = loader(shuffle=True, batch_size=9, **settings).epoch(4)
    ordered = torch.cat([batch.inputs for batch in loader(**settings).epoch(4)])
    for batch in shuffled:
        assert batch.inputs.equal(ordered[batch.indices])
    assert not ordered.equal(torch.cat([batch.inputs for batch in loader(**settings).epoch(5)]))


def test_cutout_sets_a_square_to_the_mean() -> None:
    batch = next(loader(augment=augment(cutout=3)).epoch(0))
    zeros = (batch.inputs == 0).all(1).sum((1, 2))
    assert zeros.min() >= 4  # a corner of the image
    assert zeros.max() == 9


def test_prefetched_batches_are_the_same() -> None:
    settings: dict[str, Any] = {"shuffle": True, "augment": augment(flip=True, crop_padding=1)}
    for plain, ready in zip(loader(**settings).epoch(0), loader(prefetch=2, **settings).epoch(0), strict=True):
        assert ready.inputs.equal(plain.inputs)
        assert ready.targets.equal(plain.targets)


def test_closing_an_epoch_early_ends_its_thread() -> None:
    epoch = loader(prefetch=2).epoch(0)
    next(epoch)
    epoch.close()
    assert all(thread.name != "distrain-prefetch" for thread in threading.enumerate())


def test_batches_do_not_share_memory_with_the_data() -> None:
    first, second = list(loader(batch_size=60).epoch(0))
    first.inputs.zero_()
    assert normalised(IMAGES.images[60:]).float().sub(second.inputs).abs().max() < 1e-5
    again = next(loader(batch_size=60).epoch(0))
    assert again.inputs.abs().sum() > 0


def test_no_images_give_no_steps() -> None:
    empty = loader(random_images(0))
    assert len(empty) == 0
    assert list(empty.epoch(0)) == []


def test_prefetching_is_off_only_on_cpu_with_images_in_memory() -> None:
    spec = DataSpec(3, 8, 6, ("a", "b"))
    resident = assemble(data_config(), spec, IMAGES, random_images(3))
    mapped = assemble(data_config(), spec, Images(IMAGES.images, IMAGES.targets, torch.arange(103)), random_images(3))
    cuda = torch.device("cuda")
    assert prefetch_depth(data_config(), resident, CPU) == 0
    assert prefetch_depth(data_config(), mapped, CPU) == 2
    assert prefetch_depth(data_config(), resident, cuda) == 2
    assert prefetch_depth(data_config(prefetch=5), resident, CPU) == 5
    assert prefetch_depth(data_config(prefetch=0), mapped, CPU) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_batches_on_cuda_equal_those_on_cpu(mapped: bool, prefetch: int) -> None:
    images = Images(IMAGES.images, IMAGES.targets, torch.arange(103)) if mapped else IMAGES
    settings: dict[str, Any] = {
        "shuffle": True,
        "augment": augment(flip=True, crop_padding=2, cutout=3),
        "memory_format": torch.channels_last,
    }
    on_cuda = loader(images, device=torch.device("cuda"), prefetch=prefetch, **settings)
    for ours, expected in zip(on_cuda.epoch(0), loader(**settings).epoch(0), strict=True):
        assert ours.inputs.is_cuda
        assert ours.inputs.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(ours.inputs.cpu(), expected.inputs, rtol=1e-6, atol=1e-6)
        assert ours.targets.cpu().equal(expected.targets)
        assert ours.indices.equal(expected.indices)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_masks_are_moved_like_their_images_in_training_and_not_in_evaluation(prefetch: int) -> None:
    # Each mask is the first channel of its image, so that it can be recognised.
    pixels = random_images(23).images.clamp(1, 200)
    split = Images(pixels, pixels[:, 0].clone())
    spec = DataSpec(3, 8, 6, tuple("abcde"), target="mask")
    options = {"spec": spec, "mean": [0.0] * 3, "std": [1.0] * 3, "prefetch": prefetch}
    moving = loader(split, **options, augment=augment(flip=True, crop_padding=2))
    for batch in moving.epoch(0, consumed=3):
        shown = (batch.inputs[:, 0] * 255).round().to(torch.uint8)
        assert batch.targets.equal(shown.masked_fill(shown == 0, IGNORED))
    still = torch.cat([batch.targets for batch in loader(split, **options, shuffle=False).epoch(0)])
    assert still.equal(split.targets)
