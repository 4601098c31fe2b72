"""Promise 1: the parallel run is the serial run. Parameters are compared after 50 steps, counts as integers."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.harness import run_ranks, soaked
from tests.runs import ALL_AUGMENTATIONS, relative_difference, small, train_on_rank

#: Named ways of training that must not depend on the number of ranks; the sizes don't divide by 2 or 3. Rates are low
#: enough that a ReLU or a pooling that rounding tips over (which no order of summation can avoid) does not spread.
VARIANTS = {
    "plain": (),
    "momentum": ("optimizer.momentum=0.9", "optimizer.nesterov=true", "optimizer.weight_decay=0.01"),
    "adam": ("optimizer=adam", "optimizer.eps=1e-3"),
    "augmented": ("data.augment.flip=true", "data.augment.crop_padding=2", "data.augment.cutout=3"),
    "all augmentations": ALL_AUGMENTATIONS,
    "accumulated": ("trainer.micro_batch_size=2", "data.augment.flip=true"),
    "clipped": ("trainer.grad_clip_norm=0.1", "trainer.micro_batch_size=3", "scheduler=cosine"),
    "fewer samples than ranks": ("data.batch_size=23",),
    "CIFAR-10 CNN": ("model=cifar_cnn", "data.height=32", "data.width=32", "data.augment.flip=true"),
    "many buckets": (),
    "batch norm": ("model=custom", "model._target_=tests.runs.NormNet", "+model.kwargs.norm=batch"),
    "group norm": ("model=custom", "model._target_=tests.runs.NormNet", "+model.kwargs.norm=group"),
    "ResNet-18": ("model=resnet18", "model.norm=group", "trainer.max_steps=3", "optimizer.lr=0.001"),
}
BOUNDS = {"fp32": 1e-5, "fp64": 1e-12}


def overrides(variant: str, precision: str) -> tuple[str, ...]:
    return (
        "optimizer=sgd",
        "optimizer.lr=0.01",
        f"trainer.precision={precision}",
        "trainer.max_steps=50",
        "trainer.epochs=100",
        # An epoch is five steps; its saves are tested elsewhere.
        "checkpoint.every_epochs=100",
        "resume=never",
        *VARIANTS[variant],
    )


@functools.cache
def serial(variant: str, precision: str, folder: Path) -> dict[str, Any]:
    run: dict[str, Any] = run_ranks(train_on_rank, 1, small(*overrides(variant, precision), f"run_dir={folder}"))[0]
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


#: All variants on three ranks, whose shares are unequal, in the precision that shows the smallest fault; and one more.
ALWAYS = [(variant, 3, "fp64") for variant in VARIANTS] + [("clipped", 2, "fp32")]


@pytest.mark.parametrize("case", soaked(itertools.product(VARIANTS, [2, 3], BOUNDS), ALWAYS), ids=str)
def test_ddp_is_the_serial_run(case: tuple[str, int, str], folder: Path) -> None:
    variant, ranks, precision = case
    options = [*overrides(variant, precision), "strategy=ddp", f"run_dir={folder}/ddp"]
    if variant == "many buckets":
        options += ["strategy.first_bucket_mb=0.001", "strategy.bucket_mb=0.01"]
    expected = serial(variant, precision, folder)
    runs = run_ranks(train_on_rank, ranks, small(*options))
    for run in runs:
        assert relative_difference(run["model"], expected["model"]) <= BOUNDS[precision]
        for count in ("test_correct", "test_count", "samples", "steps"):
            assert run["summary"][count] == expected["summary"][count]
        assert run["summary"]["test_loss"] == pytest.approx(expected["summary"]["test_loss"], rel=1e-4)
    for run in runs[1:]:
        assert relative_difference(run["model"], runs[0]["model"]) == 0
