"""Synthetic images have the configured shape, are reproducible and can be learned."""

from __future__ import annotations

import pytest
import torch

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
