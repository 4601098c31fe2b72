"""Pairs of the global batch are mixed alike on any number of ranks; their targets are mixed by the same shares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distrain.config.augment import MixingConfig
from distrain.data.augmentation import mixing
from distrain.data.augmentation.draws import Draws
from distrain.data.base import DataSpec, Images
from distrain.data.batch import Batch
from distrain.data.loader import Loader
from tests.data.helpers import augment, random_images

HEIGHT, WIDTH, CLASSES = 8, 6, 5


def loader(images: Images, config: MixingConfig, *, repeats: int = 1, target: str = "class", **changes: Any) -> Loader:
    settings: dict[str, Any] = {
        "batch_size": 13,
        "shard": (0, 1),
        "mean": [0.0] * 3,
        "std": [1 / 255] * 3,
        "device": torch.device("cpu"),
        "dtype": torch.float64,
        "memory_format": torch.contiguous_format,
        "shuffle": True,
        "augment": augment(mixing=config, repeats=repeats),
        "spec": DataSpec(3, HEIGHT, WIDTH, tuple("abcde"), target=target),
    }
    return Loader(images, **{**settings, **changes})


def joined(shares: list[list[Batch]]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Inputs, targets and indices of each global batch."""
    return [
        (
            torch.cat([batch.inputs for batch in batches]),
            torch.cat([batch.targets for batch in batches]),
            torch.cat([batch.indices for batch in batches]),
        )
        for batches in zip(*shares, strict=True)
    ]


@pytest.mark.parametrize("mode", ["batch", "pair"])
@pytest.mark.parametrize("repeats", [1, 3])
def test_any_number_of_ranks_mixes_the_same_pairs(mode: str, repeats: int) -> None:
    images, config = random_images(44), MixingConfig(0.8, 1.0, 0.9, mode=mode)
    whole = joined([list(loader(images, config, repeats=repeats).epoch(2))])
    for ranks in (2, 3, 5, 14):
        shards = [loader(images, config, repeats=repeats, shard=(rank, ranks)) for rank in range(ranks)]
        for parts, expected in zip(joined([list(shard.epoch(2)) for shard in shards]), whole, strict=True):
            for part, tensor in zip(parts, expected, strict=True):
                assert part.equal(tensor)
    resumed = joined([list(loader(images, config, repeats=repeats).epoch(2, consumed=26))])
    for parts, expected in zip(resumed, whole[2:], strict=True):
        assert all(part.equal(tensor) for part, tensor in zip(parts, expected, strict=True))


@pytest.mark.parametrize("cut", [False, True])
def test_images_and_targets_are_mixed_by_the_same_share(cut: bool) -> None:
    images = random_images(40)
    config = MixingConfig(0.0 if cut else 1.0, 1.0 if cut else 0.0, mode="pair")
    for batch in loader(images, config).epoch(0):
        rows = batch.indices
        count = len(rows)
        own = images.images[rows].double()
        for place in range(count):
            partner = place ^ 1 if place ^ 1 < count else place
            other = own[partner]
            mixed, targets = batch.inputs[place], batch.targets[place]
            if partner == place:
                assert mixed.equal(own[place])
                assert targets.argmax() == images.targets[rows[place]]
                continue
            if cut:
                is_own = (mixed == own[place]).all(0)
                is_other = (mixed == other).all(0) & ~is_own
                assert bool((is_other | is_own).all())
                share = 1 - float(is_other.double().mean())
            else:
                apart = (own[place] - other).abs() > 100
                share = float(((mixed - other) / (own[place] - other))[apart].mean())
                torch.testing.assert_close(mixed, share * own[place] + (1 - share) * other, atol=1e-3, rtol=0)
            expected = torch.zeros(CLASSES)
            expected[images.targets[rows[place]]] += share
            expected[images.targets[rows[partner]]] += 1 - share
            torch.testing.assert_close(targets, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_have_the_moments_of_the_beta_distribution(alpha: float) -> None:
    share = mixing.drawn(MixingConfig(alpha), Draws(1, 0, torch.arange(40_000)), HEIGHT, WIDTH)[0]
    assert bool(((share >= 0) & (share <= 1)).all())
    assert float(share.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(share.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)
    fourth = float((share - 0.5).pow(4).mean())
    assert fourth == pytest.approx(3 / (16 * (2 * alpha + 1) * (2 * alpha + 3)), rel=0.05)


def test_probabilities_of_mixing_and_of_cutting() -> None:
    drawn = mixing.drawn(MixingConfig(0.5, 0.5, 0.7, 0.25), Draws(3, 1, torch.arange(20_000)), 40, 40)
    mixed, cut = drawn[0] < 1, drawn[1] >= 0
    assert float((drawn[0] == 1).double().mean()) == pytest.approx(0.3, abs=0.03)
    assert float(cut.double().mean()) == pytest.approx(0.7 * 0.25, abs=0.02)
    area = (drawn[2] - drawn[1]) * (drawn[4] - drawn[3]) / 1600
    torch.testing.assert_close(drawn[0][cut], 1 - area[cut])
    assert not bool((mixed & ~cut & (drawn[0] <= 0)).any())


def test_masks_are_cut_like_their_images() -> None:
    images = random_images(20, channels=1)
    masks = Images(images.images.expand(-1, 3, -1, -1), images.images.squeeze(1) % 5)
    for batch in loader(masks, MixingConfig(0.0, 1.0, mode="pair"), target="mask").epoch(0):
        assert (batch.inputs[:, 0] % 5).equal(batch.targets.double())


def test_labels_and_numbers_are_means_by_share() -> None:
    images = random_images(20)
    targets = torch.rand(20, CLASSES, generator=torch.Generator().manual_seed(1))
    batch = next(loader(Images(images.images, targets), MixingConfig(1.0), target="numbers").epoch(0))
    own = targets[batch.indices]
    share = (batch.targets[0] - own[1]) / (own[0] - own[1])
    torch.testing.assert_close(share, share.mean().expand(CLASSES), atol=1e-4, rtol=0)


def test_copies_of_an_image_are_augmented_anew_and_not_mixed_with_each_other() -> None:
    images = random_images(30)
    one = loader(images, MixingConfig(1.0), repeats=3, augment=augment(flip=True, crop_padding=2, repeats=3))
    batches = list(one.epoch(0))
    indices = torch.cat([batch.indices for batch in batches])
    assert len(indices) == 30
    assert indices.bincount(minlength=30).unique().tolist() == [0, 3]
    inputs = torch.cat([batch.inputs for batch in batches])
    copies = inputs.view(10, 3, *inputs.shape[1:])
    assert sum(not copy[0].equal(copy[1]) for copy in copies) >= 8
    for start in range(0, 40, 13):
        places = torch.arange(start, start + 13)
        others = mixing.partners(start, 13, places, 3)
        assert mixing.partners(start, 13, others, 3).equal(places)
        same = others // 3 == places // 3
        assert bool((others[same] == places[same]).all()) or start % 3
