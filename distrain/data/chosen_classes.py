"""Some of a data set's classes, as a data set of its own: the key ``data.classes``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distrain.data.base import Images
from distrain.errors import ConfigError, config_error


def choose(chosen: Sequence[str] | None, names: Sequence[str]) -> tuple[str, ...]:
    """The classes of the data set, in the order of their new numbers.

    Args:
        chosen: The key ``data.classes``; ``None``: all.
        names: Names of all classes.

    Raises:
        ConfigError: A name is unknown or given twice, or there are fewer than two.
    """
    if chosen is None:
        return tuple(names)
    for name in chosen:
        if name not in names:
            raise ConfigError("data.classes", name, "is no class of this data set", names)
    if len(set(chosen)) < len(chosen):
        raise config_error("data.classes", f"{', '.join(chosen)}: a class is there twice")
    if len(chosen) < 2:
        raise config_error("data.classes", f"[{', '.join(chosen)}]: at least two classes are needed")
    return tuple(chosen)


def only(images: Images, chosen: Sequence[str], names: Sequence[str]) -> Images:
    """The images of the chosen classes, in order, with their new class numbers.

    Args:
        images: Of all classes; the targets are class numbers, int64 [N].
        chosen: Names of the chosen classes.
        names: Names of all classes.
    """
    if tuple(chosen) == tuple(names):
        return images
    assert isinstance(images.targets, Tensor)
    new_numbers = torch.tensor([chosen.index(name) if name in chosen else -1 for name in names])
    targets = new_numbers[images.targets]
    positions = (targets >= 0).nonzero()[:, 0]
    return Images(images.pick(positions), targets[positions])
