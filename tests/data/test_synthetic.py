"""Synthetic images have the configured shape, are reproducible and can be learned."""

from __future__ import annotations

import pytest
import torch

from distrain.data.base import IGNORED
from distrain.errors import ConfigError
from tests.data.helpers import images_of, source

SMALL = {"channels": 2, "height": 9, "width": 7, "classes": 3, "train_size": 200, "test_size": 50}


def test_shapes_are_as_configured() -> None:
    splits = source("synthetic", **SMALL).load()
    assert images_of(splits.train).shape == (180, 2, 9, 7)
    assert (len(splits.val), len(splits.test)) == (20, 50)
    assert splits.test.targets.bincount().tolist() == [17, 17, 16]
    assert splits.spec.classes == ("0", "1", "2")


def test_images_depend_on_their_own_seed_only() -> None:
    first = source("synthetic", **SMALL).load()
    torch.manual_seed(1)
    assert images_of(source("synthetic", **SMALL).load().train).equal(images_of(first.train))
    assert not images_of(source("synthetic", generator_seed=1, **SMALL).load().train).equal(images_of(first.train))


def test_classes_can_be_learned_from_the_training_images() -> None:
    splits = source("synthetic", **SMALL).load()
    train, test = images_of(splits.train).flatten(1).float(), images_of(splits.test).flatten(1).float()
    means = torch.stack([train[splits.train.targets == label].mean(0) for label in range(3)])
    nearest = torch.cdist(test, means).argmin(1)
    assert (nearest == splits.test.targets).float().mean() > 0.9


def test_more_than_the_memory_limit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.memory_limit_mb=1: .* take 35 MiB"):
        source("synthetic", memory_limit_mb=1).describe()


def test_labels_numbers_and_masks_can_be_learned_by_a_linear_map() -> None:
    for target in ("labels", "numbers", "mask"):
        splits = source("synthetic", target=target, **{**SMALL, "height": 8, "noise": 0.02}).load()
        assert splits.spec.target == target
        train, test = splits.train, splits.test
        if target == "mask":
            # Each pixel by itself.
            assert train.targets.shape == (180, 8, 7)
            assert train.targets.unique().tolist() == [0, 1, 2, IGNORED]
            known = [part.targets != IGNORED for part in (train, test)]
            pixels = [images_of(part).permute(0, 2, 3, 1) for part in (train, test)]
            inputs = [part[mask] for part, mask in zip(pixels, known, strict=True)]
            values = [part.targets[mask] for part, mask in zip((train, test), known, strict=True)]
            wanted = [torch.nn.functional.one_hot(value.long(), 3) for value in values]
        else:
            inputs = [images_of(train).flatten(1), images_of(test).flatten(1)]
            wanted = [train.targets, test.targets]
        first, second = (torch.cat([part.double(), torch.ones(len(part), 1).double()], dim=1) for part in inputs)
        predicted = second @ torch.linalg.lstsq(first, wanted[0].double()).solution
        # Of labels and classes, whether they apply; of numbers, whether they are large.
        right = ((predicted > 0.5) == (wanted[1] > 0.5)).double().mean()
        assert right > 0.8, (target, right)


def test_one_class_is_refused_and_one_number_is_not() -> None:
    for target in ("class", "mask"):
        with pytest.raises(ConfigError, match=rf"data\.classes=1: leaves nothing to tell apart .*target={target}"):
            source("synthetic", **{**SMALL, "classes": 1, "target": target}).describe()
    assert source("synthetic", **{**SMALL, "classes": 1, "target": "numbers"}).load().test.targets.shape == (50, 1)
