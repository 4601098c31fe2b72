"""The digits are read from scikit-learn's package, completely and in reproducible splits."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from distrain.errors import ConfigError
from tests.data.helpers import images_of, source
from tests.harness import run_ranks


def test_all_digits_are_loaded_in_reproducible_splits() -> None:
    splits = source("digits").load()
    assert (len(splits.train), len(splits.val), len(splits.test)) == (1294, 144, 359)
    assert images_of(splits.train).shape == (1294, 1, 8, 8)
    assert splits.resident
    labels = torch.cat([part.targets for part in (splits.train, splits.val, splits.test)])
    # Published number of images of each digit.
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert images_of(source("digits").load().test).equal(images_of(splits.test))
    assert not source("digits", split_seed=1).load().test.targets.equal(splits.test.targets)


def test_pixel_values_are_scaled_to_255() -> None:
    images = images_of(source("digits").load().train)
    assert images.unique().tolist() == [(value * 255 + 8) // 16 for value in range(17)]


def test_shape_and_classes_are_known_before_loading() -> None:
    spec = source("digits").describe()
    assert (spec.channels, spec.height, spec.width) == (1, 8, 8)
    assert spec.classes == tuple("0123456789")


def imports_sklearn() -> bool:
    source("digits").load()
    return "sklearn" in sys.modules


def test_scikit_learn_is_not_imported() -> None:
    assert run_ranks(imports_sklearn, 1) == [False]


def test_a_missing_package_is_refused_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'distrain\[digits\]'"):
        source("digits").describe()
