from __future__ import annotations

import pytest
import torch

from distrain.data.base import DataSpec, assemble
from distrain.data.folds import split_fold
from distrain.errors import ConfigError
from tests.data.helpers import data_config, random_images

GROUPS = torch.tensor([0] * 23 + [1] * 5 + [2] * 40 + [3])


@pytest.mark.parametrize("count", [2, 5, 69])
def test_folds_are_equal_parts_with_equal_shares_of_each_class(count: int) -> None:
    folds = [split_fold(f"{number}/{count}", GROUPS, 0) for number in range(1, count + 1)]
    inside = [part for _, part in folds]
    assert torch.cat(inside).sort().values.tolist() == list(range(69))
    assert {len(part) for part in inside} <= {69 // count, -(-69 // count)}
    for label in range(4):
        sizes = [int((GROUPS[part] == label).sum()) for part in inside]
        assert max(sizes) - min(sizes) <= 1
    for outside, part in folds:
        assert torch.cat((outside, part)).sort().values.tolist() == list(range(69))


def test_folds_depend_on_split_seed() -> None:
    assert not split_fold("1/5", GROUPS, 0)[1].equal(split_fold("1/5", GROUPS, 1)[1])


@pytest.mark.parametrize("fold", ["0/5", "6/5", "1/1", "1", "a/b", "1/2/3", "1/70", "-1/5"])
def test_a_wrong_fold_is_refused_in_one_line(fold: str) -> None:
    with pytest.raises(ConfigError, match=rf"^data\.fold={fold}: (must be K/N|there are only 69 samples)"):
        split_fold(fold, GROUPS, 0)


def test_a_fold_takes_the_place_of_the_held_out_validation_samples() -> None:
    images = random_images(50)
    spec = DataSpec(3, 8, 6, tuple("abcde"))
    splits = [assemble(data_config(fold=f"{number}/5"), spec, images, None) for number in range(1, 6)]
    assert [(len(split.train), len(split.val)) for split in splits] == [(40, 10)] * 5
    assert all(torch.bincount(split.val.targets).tolist() == [2] * 5 for split in splits)
    with pytest.raises(ConfigError, match=r"data\.fold=1/5: .* validation samples of their own"):
        assemble(data_config(fold="1/5"), spec, images, None, val=images)
