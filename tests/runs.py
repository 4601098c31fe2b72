"""Small runs that tests share: their configuration, and what a rank does with it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distrain.config.load import load_config
from distrain.config.schema import Config
from distrain.data.base import Splits, data_source
from distrain.models.base import BlockSequence
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.training.assembly import build_trainer
from distrain.training.run_plan import RunPlan
from distrain.training.trainer import Trainer
from tests import composing

CONF = composing.CONF
LAUNCH = Path(__file__).parent.parent / "launch"


def launched(folder: Path, script: str, *arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
    """Runs a command of ``launch/`` as its user would, in a folder, and returns what it said."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(LAUNCH / f"{script}.py"), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(LAUNCH.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


#: Small and fast, with everything that doesn't divide: 47 images to train on, batches of 10, a ragged last one of 7.
SMALL = (
    "data=synthetic",
    "data.channels=3",
    "data.height=8",
    "data.width=8",
    "data.classes=4",
    "data.train_size=53",
    "data.val_fraction=0.1",
    "data.test_size=31",
    "data.batch_size=10",
    "data.eval_batch_size=7",
    "logger=none",
    "trainer.progress=off",
    "runtime.threads=1",
    "runtime.timeout_seconds=120",
    "runtime.setup_timeout_seconds=120",
)


#: Every augmentation at once, each strong enough to matter on images of 8x8 pixels.
ALL_AUGMENTATIONS = (
    "data.augment.flip=true",
    "data.augment.crop_padding=1",
    "data.augment.random_resized_crop.scale=[0.2,1]",
    "data.augment.color_jitter={brightness: 0.4, contrast: 0.4, saturation: 0.4, hue: 0.1}",
    "data.augment.auto_augment.policy=randaugment",
    "data.augment.random_erasing={probability: 0.5, value: random}",
    "data.augment.mixing={mixup_alpha: 0.8, cutmix_alpha: 1.0, mode: pair}",
    "data.augment.repeats=2",
    "data.augment.batch_transform._target_=tests.runs.dimmed",
    "data.eval_crop=0.75",
)


def dimmed(images: Tensor, seeds: Tensor) -> Tensor:
    """A user's augmentation of a batch: each image by a factor from its seed."""
    return (images * ((seeds & 7).view(-1, 1, 1, 1) + 8) / 16).to(torch.uint8)


def compose(*overrides: str) -> Config:
    """The checked configuration of a command line."""
    return load_config(composing.compose(overrides))


def small(*overrides: str) -> Config:
    """The same for a small synthetic run."""
    return compose(*SMALL, *overrides)


class NormNet(BlockSequence):
    """A small CNN with a normalisation layer after each convolution."""

    def __init__(self, in_channels: int, num_classes: int, norm: str) -> None:
        def block(channels_in: int, channels_out: int) -> nn.Module:
            layer = nn.BatchNorm2d(channels_out) if norm == "batch" else nn.GroupNorm(2, channels_out)
            return nn.Sequential(nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1), layer, nn.ReLU())

        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes))
        super().__init__({"first": block(in_channels, 8), "second": block(8, 16), "head": head})


class PointwiseNet(nn.Module):
    """A small network that is no sequence, with 1×1 convolutions, one of them with a stride, and linear layers."""

    def __init__(self, in_channels: int, num_classes: int, norm: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8) if norm == "batch" else nn.GroupNorm(2, 8)
        self.widen = nn.Conv2d(8, 16, 1, stride=2)
        self.shortcut = nn.Conv2d(8, 16, 1, stride=2, bias=False)
        self.hidden = nn.Linear(16, 12)
        self.head = nn.Linear(12, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images ``[N, C, H, W]`` to logits ``[N, num_classes]``."""
        features = self.norm(self.stem(images)).relu()
        pooled = (self.widen(features).relu() + self.shortcut(features)).mean((2, 3))
        logits: Tensor = self.head(self.hidden(pooled).relu())
        return logits


def check(configuration: Config, world: World) -> None:
    """Refuses what ``launch/train.py`` would refuse before it loads data."""
    RunPlan.resolve(configuration, world).check()


def trainer_for(configuration: Config, runtime: Runtime, splits: Splits | None = None) -> Trainer:
    """A trainer with its parts, by default on the configured data."""
    plan = RunPlan.resolve(configuration, runtime.world)
    return build_trainer(plan, runtime, splits or plan.load())


def train_on_rank(configuration: Config) -> dict[str, Any]:
    """What a rank of a test run does: trains as ``launch/train.py`` would.

    Returns:
        ``summary`` and, as plain tensors, ``model`` after the last step.
    """
    world = World.from_environment()
    check(configuration, world)
    splits = data_source(configuration.data).load()
    with Runtime(configuration, world) as runtime:
        trainer = trainer_for(configuration, runtime, splits)
        summary = trainer.fit()
        model = {name: tensor.detach().clone() for name, tensor in trainer.strategy.model_state().items()}
    return {"summary": summary, "model": model, "run_dir": str(runtime.run_dir)}


def relative_difference(model: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """‖difference‖ / ‖reference‖ over all floating-point tensors of the model as one vector, in double precision."""
    assert model.keys() == reference.keys()
    floating = [name for name, tensor in reference.items() if tensor.is_floating_point()]
    difference = sum(float((model[name].double() - reference[name].double()).square().sum()) for name in floating)
    whole = sum(float(reference[name].double().square().sum()) for name in floating)
    return math.sqrt(difference / whole)
