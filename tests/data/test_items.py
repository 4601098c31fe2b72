from __future__ import annotations

import contextlib
import os
import random
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distrain.data.base import DataSpec, image_moments
from distrain.data.batch import Batch
from distrain.data.items import Items
from distrain.data.loader import Loader
from distrain.data.reading import ItemReader
from distrain.data.workers import ItemWorkers
from distrain.errors import SampleError
from tests.data.helpers import augment

SPEC = DataSpec(1, 4, 4, ("a", "b", "c"))


class Numbered(ItemReader):
    """Sample i: an image of the value i besides three random pixels, of class i modulo 3."""

    def __init__(self, count: int = 50, wrong: int = -1, deadly: int = -1) -> None:
        self.count, self.wrong, self.deadly = count, wrong, deadly

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> tuple[Tensor, Any]:
        if row == self.wrong:
            raise ValueError("it is torn")
        if row == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        image = torch.full((1, 4, 4), row, dtype=torch.uint8)
        drawn = [int(torch.randint(256, ())), np.random.randint(256), random.randrange(256)]  # noqa: NPY002
        image[0, 0, :3] = torch.tensor(drawn)
        return image, torch.tensor(row % 3)

    def name(self, row: int) -> str:
        return f"page {row}"


@pytest.fixture(scope="module")
def workers() -> Iterator[ItemWorkers]:
    with contextlib.closing(ItemWorkers(2)) as shared:
        yield shared


@pytest.fixture(scope="module")
def items(workers: ItemWorkers) -> Items:
    return Items.of(Numbered(), SPEC, workers)


def here(reader: ItemReader | None = None) -> Items:
    """Samples that are read in this process."""
    return Items.of(reader or Numbered(), SPEC, ItemWorkers(0))


def batches(items: Items, shard: tuple[int, int] = (0, 1), epoch: int = 1, consumed: int = 0) -> list[Batch]:
    loader = Loader(
        items,
        batch_size=8,
        shard=shard,
        mean=[0.0],
        std=[1 / 255],
        device=torch.device("cpu"),
        dtype=torch.float32,
        memory_format=torch.contiguous_format,
        seed=3,
        shuffle=True,
        augment=augment(crop_padding=1),
    )
    return list(loader.epoch(epoch, consumed))


def joined(*shares: list[Batch]) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and positions of an epoch, from the shares of all ranks."""
    parts = [batch for together in zip(*shares, strict=True) for batch in together]
    inputs, targets = torch.cat([part.inputs for part in parts]), torch.cat([part.targets for part in parts])
    return inputs, targets, torch.cat([part.indices for part in parts])


def test_samples_and_their_random_draws_depend_on_neither_ranks_nor_workers_nor_where_an_epoch_is_resumed(
    items: Items,
) -> None:
    expected = joined(batches(here()))
    assert sorted(expected[2].tolist()) == list(range(50))
    assert torch.equal(expected[1], expected[2] % 3)
    for shards in (1, 2, 3):
        together = joined(*(batches(items, (index, shards)) for index in range(shards)))
        assert all(map(torch.equal, together, expected)), shards
        resumed = joined(*(batches(items, (index, shards), consumed=21) for index in range(shards)))
        assert all(torch.equal(part, whole[21:]) for part, whole in zip(resumed, expected, strict=True)), shards
    assert not torch.equal(joined(batches(items, epoch=2))[2], expected[2])


def test_reading_leaves_the_random_generators_of_the_training_as_they_were(items: Items) -> None:
    for split in (items, here()):
        torch.manual_seed(1)
        first = torch.rand(3)
        torch.manual_seed(1)
        split.read(torch.arange(5))
        assert torch.equal(torch.rand(3), first)


def test_a_reading_that_is_given_up_does_not_disturb_the_next_one(items: Items) -> None:
    given_up = items.chunks(2)
    next(given_up)
    positions = torch.tensor([7, 3, 49])
    part = items.read(positions)
    assert part.images[:, 0, 3, 3].tolist() == [7, 3, 49]
    assert part.targets.tolist() == [1, 0, 1]
    with pytest.raises(SampleError, match="another reading"):
        next(given_up)


def test_a_subset_shares_the_reader_and_known_targets_replace_those_of_the_samples(workers: ItemWorkers) -> None:
    known = Items.of(Numbered(), SPEC, workers, targets=torch.arange(50) % 2)
    part = known.subset(torch.tensor([5, 8])).read(torch.tensor([1, 0]))
    assert part.images[:, 0, 3, 3].tolist() == [8, 5]
    assert part.targets.tolist() == [0, 1]
    assert part.images.dtype == torch.uint8
    assert len(known.read(torch.arange(0))) == 0


def test_channel_statistics_are_measured_in_chunks(items: Items) -> None:
    assert torch.equal(image_moments(items), image_moments(items.read(torch.arange(50))))


class Odd(Numbered):
    """The last sample is unlike the others."""

    def __init__(self, image: Tensor, target: Tensor) -> None:
        super().__init__()
        self.odd = image, target

    def __getitem__(self, row: int) -> tuple[Tensor, Any]:
        return self.odd if row == 49 else super().__getitem__(row)


GREY, ONE = torch.zeros(1, 4, 4, dtype=torch.uint8), torch.tensor(1)


@pytest.mark.parametrize(
    ("reader", "message"),
    [
        (Numbered(wrong=9), r"page 9 can't be read \(ValueError: it is torn\) at .*test_items.py:\d+$"),
        (Odd(GREY[:, :3], ONE), r"page 49 .*the image is \[1, 3, 4\], and others are \[1, 4, 4\]"),
        (Odd(GREY.float(), ONE), "page 49 .*the image is float32, and others are uint8"),
        (Odd(GREY, ONE + 2), "page 49 .*the class is 3; the 3 classes are numbered from 0 to 2"),
        (Odd(GREY, ONE - 2), "the class is -1"),
        (Odd(GREY, ONE / 3), "no whole number"),
        (Odd(GREY, torch.ones(2)), r"the target is of shape \[2\]; the number of a class is needed"),
    ],
)
def test_a_sample_that_cannot_be_read_is_named_in_one_line(reader: ItemReader, message: str) -> None:
    with pytest.raises(SampleError, match=message) as failure:
        here(reader).read(torch.arange(50))
    assert "\n" not in str(failure.value)


def test_a_failure_in_a_worker_is_the_same_line_and_has_its_traceback(workers: ItemWorkers) -> None:
    split = Items.of(Numbered(wrong=9), SPEC, workers)
    with pytest.raises(SampleError, match=r"page 9 can't be read .*it is torn.*test_items\.py") as failure:
        list(split.chunks(4))
    assert "Traceback" in str(failure.value.__cause__)
    good = Items.of(Numbered(), SPEC, workers)
    assert len(good.read(torch.arange(50))) == 50


@pytest.mark.soak  # torch notices it within five seconds
def test_a_worker_that_dies_is_explained(workers: ItemWorkers) -> None:
    split = Items.of(Numbered(deadly=11), SPEC, workers)
    with pytest.raises(SampleError, match=r"ended by SIGKILL \(out of memory\?\) while it read page 11$"):
        list(split.chunks(4))
