"""Random parts, hidden boxes and drawn operations: their ranges and frequencies; and what evaluation sees."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from distrain.config.augment import AutoAugmentConfig, ColorJitterConfig, RandomErasingConfig
from distrain.data.augmentation import erasing, policies, resize
from distrain.data.augmentation.draws import Draws
from distrain.data.augmentation.operations import Operation
from distrain.data.loader import Loader
from tests.data.helpers import source, write_image

COUNT, HEIGHT, WIDTH = 8000, 40, 60
DRAWS = Draws(1, 0, torch.arange(COUNT))


def test_random_parts_have_the_area_and_shape_that_are_asked_for() -> None:
    top, left, height, width = resize.random_boxes(DRAWS, HEIGHT, WIDTH, [0.1, 0.5], [0.75, 4 / 3])
    assert bool(((top >= 0) & (left >= 0) & (top + height <= HEIGHT) & (left + width <= WIDTH)).all())
    area = (height * width).double() / (HEIGHT * WIDTH)
    # Sides are whole numbers of pixels.
    assert 0.09 < float(area.min()) < 0.11
    assert 0.48 < float(area.max()) < 0.52
    assert float(area.mean()) == pytest.approx(0.3, abs=0.01)
    shape = (width / height).double().log()
    assert float(shape.mean()) == pytest.approx(0, abs=0.02)
    assert float(shape.abs().max()) == pytest.approx(math.log(4 / 3), abs=0.06)
    # No part of the whole area is so narrow: the largest one in the centre is taken.
    boxes = resize.random_boxes(DRAWS, HEIGHT, WIDTH, [1.0, 1.0], [0.5, 0.5])
    assert boxes.unique(dim=1).squeeze(1).tolist() == [0, 20, 40, 20]


@pytest.mark.parametrize("value", ["zero", "random"])
def test_hidden_boxes_are_inside_and_nothing_else_changes(value: str) -> None:
    config = RandomErasingConfig(0.3, value=value)
    boxes = erasing.boxes(config, DRAWS, HEIGHT, WIDTH)
    hidden = boxes[2] > 0
    assert float(hidden.double().mean()) == pytest.approx(0.3, abs=0.02)
    area = (boxes[2] * boxes[3]).double()[hidden] / (HEIGHT * WIDTH)
    assert float(area.min()) > 0.015
    assert float(area.max()) < 0.35
    images = torch.full((60, 2, HEIGHT, WIDTH), 7.0, dtype=torch.float64)
    erasing.Erasing(value).erase_(images, boxes[:, :60])
    noise = []
    for image, (top, left, height, width, _) in zip(images, boxes[:, :60].T.tolist(), strict=True):
        box = image[:, top : top + height, left : left + width]
        noise.append(box.flatten())
        assert int((image != 7).sum()) == 2 * height * width
    values = torch.cat(noise)
    assert float(values.mean()) == pytest.approx(0, abs=0.02)
    assert float(values.std()) == pytest.approx(1.0 if value == "random" else 0.0, abs=0.02)


def test_colours_change_in_a_random_order_by_what_is_asked_for() -> None:
    config = ColorJitterConfig(0.4, 0.0, 0.2, 0.1, probability=0.75)
    operations, magnitudes = policies.color_jitter(config, DRAWS)
    changed = (operations != Operation.IDENTITY).any(0)
    assert float(changed.double().mean()) == pytest.approx(0.75, abs=0.02)
    for operation, limit in ((Operation.BRIGHTNESS, 0.4), (Operation.COLOR, 0.2), (Operation.HUE, 0.1)):
        chosen = operations == operation
        assert chosen.sum(0).equal(changed.long())
        assert float(magnitudes[chosen].abs().max()) == pytest.approx(limit, rel=0.01)
        assert chosen[:, changed].double().mean(1).tolist() == pytest.approx([0.25] * 4, abs=0.02)
    assert not bool((operations == Operation.CONTRAST).any())


@pytest.mark.parametrize(
    ("policy", "layers", "kinds", "widest_rotation"),
    [
        ("randaugment", 3, 14, 30),
        ("trivialaugment", 1, 14, 135),
        ("autoaugment_cifar10", 2, 14, 20 / 3),
        ("autoaugment_imagenet", 2, 11, 30),
    ],
)
def test_policies_draw_their_operations_and_magnitudes(
    policy: str, layers: int, kinds: int, widest_rotation: float
) -> None:
    config = AutoAugmentConfig(policy, num_ops=3, magnitude=30)
    operations, magnitudes = policies.Policy(config, HEIGHT, WIDTH).layers(DRAWS)
    assert operations.shape == magnitudes.shape == (layers, COUNT)
    assert len(operations.unique()) == kinds
    rotations = magnitudes[operations == Operation.ROTATE]
    assert float((rotations < 0).double().mean()) == pytest.approx(0.5, abs=0.06)
    assert float(rotations.abs().max()) == pytest.approx(widest_rotation)
    if not policy.startswith("autoaugment"):
        counts = operations.flatten().bincount(minlength=14)[:14] / operations.numel()
        assert counts.tolist() == pytest.approx([1 / 14] * 14, abs=0.01)


@pytest.mark.parametrize("cache_format", ["pixels", "encoded"])
def test_images_are_kept_larger_and_evaluation_sees_their_centre(tmp_path: Path, cache_format: str) -> None:
    draws = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            for number in range(3):
                pixels = draws.integers(0, 256, (30, 36, 3), dtype=np.uint8)
                write_image(tmp_path / part / name / f"{number}.png", pixels)
    options = {"height": 12, "width": 16, "cache_scale": 1.25, "workers": 0, "cache_format": cache_format}
    splits = source("image_folder", root=str(tmp_path), **options).load()
    assert (splits.spec.height, splits.spec.width) == (12, 16)
    assert splits.train.shape == splits.test.shape == (3, 15, 20)
    loader = Loader(
        splits.test,
        batch_size=6,
        shard=(0, 1),
        mean=[0.0] * 3,
        std=[1 / 255] * 3,
        device=torch.device("cpu"),
        dtype=torch.float64,
        memory_format=torch.channels_last,
        spec=splits.spec,
        shown=0.8,
    )
    kept = splits.test.pick(torch.arange(6))
    assert next(loader.epoch(0)).inputs.equal(kept[:, :, 2:14, 2:18].double())
