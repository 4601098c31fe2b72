"""Configurations and small files for tests of the data package."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from distrain.config.augment import AugmentConfig
from distrain.config.groups import DataConfig
from distrain.config.registry import choices
from distrain.data import decode
from distrain.data.base import DataSource, Images, Split

ROOT = Path(__file__).parents[2]


def source(choice: str, **changes: Any) -> DataSource:
    """The data set as configured by its YAML file and some changes; a dot in a key is written as two underscores."""
    node = OmegaConf.load(ROOT / "conf" / "data" / f"{choice}.yaml")
    for key, value in changes.items():
        OmegaConf.update(node, key.replace("__", "."), value)
    chosen = choices("data")[choice]
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(chosen.schema), node))
    return cast(DataSource, chosen.target(config))


def data_config(**changes: Any) -> DataConfig:
    """Settings with the keys that all data sets share, without channel statistics."""
    return cast(DataConfig, source("synthetic", **changes)._config)  # type: ignore[attr-defined]


def augment(
    *, flip: bool | str = False, crop_padding: int = 0, crop_border: str = "zeros", cutout: int = 0, **more: Any
) -> AugmentConfig:
    return AugmentConfig(flip=flip, crop_padding=crop_padding, crop_border=crop_border, cutout=cutout, **more)


def random_images(count: int, channels: int = 3, height: int = 8, width: int = 6, seed: int = 0) -> Images:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)
    return Images(pixels, torch.arange(count) % 5)


def images_of(split: Split) -> Tensor:
    """All images of a split that is in memory."""
    assert isinstance(split, Images)
    return split.images


def write_image(path: Path, pixels: npt.NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def decode_here(
    job: Mapping[str, Any], path: Path, processes: int, images: int, report_broken: Callable[[int, str], None]
) -> dict[int, str]:
    """Stands for :func:`distrain.data.decode_processes.run`; starts no processes, which take most of a test's time."""
    messages: list[dict[str, Any]] = []
    with mock.patch.object(decode, "_report", messages.append):
        decode.decode_chunks(json.loads(json.dumps(job)), 0, 1)
    broken = {message["broken"]: message["reason"] for message in messages if "broken" in message}
    for index, reason in broken.items():
        report_broken(index, reason)
    return broken
