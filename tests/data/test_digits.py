from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from distrain.errors import ConfigError
from tests.data.helpers import source
from tests.harness import run_ranks


def test_all_real_digits_are_there_in_fixed_splits() -> None:
    splits = source("digits").load()
    assert (len(splits.train), len(splits.val), len(splits.test)) == (1294, 144, 359)
    assert splits.train.images.shape == (1294, 1, 8, 8)
    assert splits.resident
    labels = torch.cat([part.targets for part in (splits.train, splits.val, splits.test)])
    # How often each digit is in the file, as its publishers say.
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert source("digits").load().test.images.equal(splits.test.images)
    assert not source("digits", split_seed=1).load().test.targets.equal(splits.test.targets)


def test_values_use_the_whole_range() -> None:
    images = source("digits").load().train.images
    assert images.unique().tolist() == [(value * 255 + 8) // 16 for value in range(17)]


def test_description_agrees_with_what_is_loaded() -> None:
    spec = source("digits").describe()
    assert (spec.channels, spec.height, spec.width) == (1, 8, 8)
    assert spec.classes == tuple("0123456789")


def load_and_look() -> bool:
    source("digits").load()
    return "sklearn" in sys.modules


def test_scikit_learn_is_not_imported() -> None:
    assert run_ranks(load_and_look, 1) == [False]


def test_a_missing_package_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'distrain\[digits\]'"):
        source("digits").describe()
