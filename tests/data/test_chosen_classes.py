"""A part of a data set's classes is a data set of its own, with its own class numbers."""

from __future__ import annotations

import pytest
import torch

from distrain.data import chosen_classes
from distrain.data.base import Images
from distrain.errors import ConfigError
from tests.data.helpers import source

NAMES = ("cat", "dog", "owl")


def test_images_of_other_classes_are_left_out_and_numbers_follow_the_given_order() -> None:
    images = Images(torch.arange(6).view(6, 1, 1, 1), torch.tensor([0, 1, 2, 0, 1, 2]))
    found = chosen_classes.only(images, ("owl", "cat"), NAMES)
    assert found.images.flatten().tolist() == [0, 2, 3, 5]
    assert isinstance(found.targets, torch.Tensor)
    assert found.targets.tolist() == [1, 0, 1, 0]
    assert chosen_classes.only(images, NAMES, NAMES) is images


@pytest.mark.parametrize(
    ("chosen", "line"),
    [
        (["cat", "dgo"], r"data\.classes=dgo: is no class of this data set; choices: .* \(did you mean dog\?\)"),
        (["cat", "cat"], r"data\.classes: cat, cat: a class is there twice"),
        (["cat"], r"data\.classes: \[cat\]: at least two classes"),
        ([], r"data\.classes: \[\]: at least two classes"),
    ],
)
def test_what_makes_no_sense_is_refused(chosen: list[str], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        chosen_classes.choose(chosen, NAMES)


def test_digits_of_some_classes() -> None:
    pytest.importorskip("sklearn")
    whole, part = source("digits"), source("digits", classes=["8", "3"])
    assert part.describe().classes == ("8", "3")
    assert 300 < sum(map(len, (part.load().train, part.load().val, part.load().test))) < 400
    assert whole.describe().classes == tuple("0123456789")
