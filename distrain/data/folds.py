"""Cross-validation: data.fold=K/N takes one of N parts of the training samples for validation."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from distrain import rng
from distrain.errors import ConfigError

#: Identifies folds among the uses of random numbers.
_FOLD = 8


def parse_fold(fold: str) -> tuple[int, int]:
    """K and N of ``K/N``.

    Raises:
        ConfigError: It is no such text, or there is no such fold.
    """
    match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", fold)
    number, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if count < 2 or not 1 <= number <= count:
        raise ConfigError(
            "data.fold", fold, "must be K/N, fold K of N with K from 1 to N and N of at least 2, such as 1/5"
        )
    return number, count


def split_fold(fold: str, groups: Tensor, split_seed: int) -> tuple[Tensor, Tensor]:
    """Positions of the samples outside and inside of a fold, sorted.

    The folds have every sample once, and their sizes differ by at most one; so do the numbers of samples of each group
    in them.

    Args:
        fold: ``K/N``.
        groups: int64 [count], class of each sample; all 0 where there are no classes.
        split_seed: Selects the samples of each fold.

    Raises:
        ConfigError: There are fewer samples than folds.
    """
    number, count = parse_fold(fold)
    if len(groups) < count:
        raise ConfigError("data.fold", fold, f"there are only {len(groups)} samples")
    shuffled = rng.permutation(rng.key(_FOLD, split_seed), len(groups))
    # Group by group, dealt out to the folds like cards.
    dealt = shuffled[groups[shuffled].argsort(stable=True)]
    inside = torch.zeros(len(groups), dtype=torch.bool)
    inside[dealt[number - 1 :: count]] = True
    return inside.logical_not().nonzero().squeeze(1), inside.nonzero().squeeze(1)
