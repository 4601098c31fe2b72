from __future__ import annotations

from typing import Any

import pytest
import torch

from distrain.data.base import (
    DataSpec,
    Images,
    assemble,
    channel_statistics,
    check_shared_keys,
    hold_out_test,
    image_moments,
)
from distrain.errors import ConfigError
from tests.data.helpers import data_config, images_of, random_images

SPEC = DataSpec(3, 8, 6, ("a", "b", "c", "d", "e"))


def marked(count: int) -> Images:
    """Images whose label is their index, so that tests can identify them."""
    return Images(random_images(count).images, torch.arange(count))


def test_the_split_seed_alone_selects_the_validation_images() -> None:
    splits = assemble(data_config(), SPEC, marked(200), marked(30))
    assert (len(splits.train), len(splits.val), len(splits.test)) == (180, 20, 30)
    together = torch.cat((splits.train.targets, splits.val.targets))
    assert together.sort().values.equal(torch.arange(200))
    assert not splits.val.targets.equal(torch.arange(20))
    torch.manual_seed(5)
    assert assemble(data_config(), SPEC, marked(200), marked(30)).val.targets.equal(splits.val.targets)
    other = assemble(data_config(split_seed=1), SPEC, marked(200), marked(30))
    assert not other.val.targets.equal(splits.val.targets)


def test_images_stay_with_their_labels() -> None:
    images = marked(50)
    splits = assemble(data_config(), SPEC, images, marked(5))
    for part in (splits.train, splits.val):
        assert images_of(part).equal(images_of(images)[part.targets])


def test_limit_does_not_change_validation_and_test_images() -> None:
    full = assemble(data_config(), SPEC, marked(200), marked(30))
    limited = assemble(data_config(limit=15), SPEC, marked(200), marked(30))
    assert len(limited.train) == 15
    assert set(limited.train.targets.tolist()) < set(full.train.targets.tolist())
    assert limited.val.targets.equal(full.val.targets)
    assert len(limited.test) == 30


def test_a_validation_fraction_of_zero_gives_no_validation_images() -> None:
    splits = assemble(data_config(val_fraction=0.0), SPEC, marked(20), marked(3))
    assert (len(splits.train), len(splits.val)) == (20, 0)


def test_validation_images_of_the_data_set_are_used() -> None:
    splits = assemble(data_config(), SPEC, marked(20), marked(3), val=marked(7))
    assert (len(splits.train), len(splits.val)) == (20, 7)


def test_statistics_are_of_the_training_images() -> None:
    splits = assemble(data_config(), SPEC, marked(100), marked(3))
    pixels = images_of(splits.train).double() / 255
    torch.testing.assert_close(
        torch.tensor(splits.mean, dtype=torch.float64), pixels.mean((0, 2, 3)), rtol=1e-12, atol=0
    )
    expected = pixels.std((0, 2, 3), correction=0)
    torch.testing.assert_close(torch.tensor(splits.std, dtype=torch.float64), expected, rtol=1e-12, atol=0)


def test_known_moments_give_the_same_statistics() -> None:
    images = marked(40)
    measured = assemble(data_config(), SPEC, images, marked(3))
    known = assemble(data_config(), SPEC, images, marked(3), moments=image_moments(images))
    assert (known.mean, known.std) == (measured.mean, measured.std)


def test_configured_statistics_are_used() -> None:
    splits = assemble(data_config(mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 3.0]), SPEC, marked(40), marked(3))
    assert (splits.mean, splits.std) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))


def test_sums_of_the_largest_values_are_exact() -> None:
    brightest = Images(torch.full((2, 1, 37, 41), 255, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    assert image_moments(brightest).tolist() == [[[37 * 41 * 255, 37 * 41 * 255**2]]] * 2


def test_a_constant_channel_is_only_centred() -> None:
    constant = Images(torch.full((4, 1, 2, 2), 51, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    assert channel_statistics(image_moments(constant), 4) == ([0.2], [1.0])


def test_a_subset_of_a_memory_map_shares_it() -> None:
    mapped = Images(random_images(10).images, torch.arange(4), rows=torch.tensor([9, 1, 5, 0]))
    part = mapped.subset(torch.tensor([2, 0]))
    assert part.images.data_ptr() == mapped.images.data_ptr()
    assert part.targets.tolist() == [2, 0]
    assert part.pick(torch.tensor([1])).equal(mapped.images[[9]])
    splits = assemble(data_config(), SPEC, mapped, marked(3))
    assert not splits.resident


@pytest.mark.parametrize("count", [2, 3, 10, 1797])
def test_holding_out_leaves_at_least_one_sample_on_each_side(count: int) -> None:
    for fraction in (0.001, 0.2, 0.999):
        keep, held_out = hold_out_test(count, fraction, 0)
        assert len(keep) >= 1
        assert len(held_out) >= 1
        assert torch.cat((keep, held_out)).sort().values.equal(torch.arange(count))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"mean": [0.5]}, "data.mean=[0.5]: needs one value for each of the 3 channels"),
        ({"std": [0.5, 0.5]}, "data.std=[0.5, 0.5]: needs one value for each of the 3 channels"),
        ({"augment__crop_padding": 7}, "data.augment.crop_padding=7: is larger than the 8x6 images"),
        (
            {"augment__crop_padding": 6, "augment__crop_border": "reflect"},
            "data.augment.crop_padding=6: is too large to mirror the edges of the 8x6 images",
        ),
        ({"augment__cutout": 7}, "data.augment.cutout=7: is larger than the 8x6 images"),
    ],
)
def test_keys_that_do_not_fit_the_images_are_refused(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_shared_keys(data_config(**changes), SPEC)
    assert str(caught.value) == key
