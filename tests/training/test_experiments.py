"""The experiments of published recipes, on small stand-ins for their data: to the end, resumed, and evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import distrain
from distrain.cli import app
from distrain.data import cifar10
from tests.harness import run_ranks
from tests.runs import compose, relative_difference
from tests.training.test_averaging import saved

#: Training images of each class of the stand-ins, and of a file of CIFAR-10's.
CLASSES, TRAINED, TESTED, IN_FILE = 4, 12, 4, 20
SHORT = (
    "strategy=ddp",
    "trainer.epochs=2",
    "trainer.progress=off",
    "trainer.deterministic=true",
    "checkpoint.every_steps=3",
    "checkpoint.keep=9",
    "logger=none",
    "runtime.threads=1",
)
EXPERIMENTS = {
    "cifar10_resnet18": ("data.batch_size=20",),
    "imagenet_resnet50": (
        "data.batch_size=12",
        "data.height=64",
        "data.width=64",
        "trainer.ema.every=1",
        "optimizer.lr=0.02",
        "scheduler.warmup_epochs=0.5",
        # The ranks of tests can't have children.
        "data.workers=0",
    ),
}


def write_imagenet(root: Path) -> None:
    """JPEG files of many sizes in ImageNet's folders; some are grey or CMYK, as some of ImageNet's are."""
    generator = np.random.default_rng(0)
    for split, count in (("train", TRAINED), ("val", TESTED)):
        for label in range(CLASSES):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for index in range(count):
                height, width = generator.integers(50, 200, 2)
                pixels = (generator.normal(60 * label + 30, 25, (height, width, 3))).clip(0, 255).astype(np.uint8)
                mode = {3: "L", 7: "CMYK"}.get(index, "RGB")
                Image.fromarray(pixels).convert(mode).save(folder / f"{split}_{index}.JPEG")
    # Of this size the part that is shown may be larger than the image by rounding.
    Image.new("RGB", (166, 99)).save(root / "train" / "n00000000" / "odd.JPEG")


def write_cifar10(root: Path) -> None:
    """Files in the format of CIFAR-10's, with few images each."""
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    (folder / "batches.meta.txt").write_text("\n".join(cifar10.CLASSES))
    generator = np.random.default_rng(0)
    for name in (*(f"data_batch_{index}.bin" for index in range(1, 6)), "test_batch.bin"):
        images = generator.integers(0, 256, (IN_FILE, 3073), dtype=np.uint8)
        images[:, 0] %= len(cifar10.CLASSES)
        (folder / name).write_bytes(images.tobytes())


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "BATCH_IMAGES", IN_FILE)


def train(options: tuple[str, ...]) -> None:
    """Trains as a rank."""
    cifar10.BATCH_IMAGES = IN_FILE
    with app.prepared(compose(*options)) as trainer:
        trainer.fit()


@pytest.mark.soak
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_trains_to_its_end_and_resumes(experiment: str, tmp_path: Path) -> None:
    root, run_dir = tmp_path / "data", tmp_path / "run"
    {"imagenet_resnet50": write_imagenet, "cifar10_resnet18": write_cifar10}[experiment](root)
    options = (f"experiment={experiment}", f"data.root={root}", *SHORT, *EXPERIMENTS[experiment])
    run_ranks(train, 2, (*options, f"run_dir={run_dir}"))
    run = distrain.read_run(run_dir)
    steps = run.summary["steps"]
    middle = run_dir / "checkpoints" / "step_00000003"
    run_ranks(train, 2, (*options, f"run_dir={tmp_path}/again", f"resume={middle}"))
    assert relative_difference(saved(tmp_path / "again", steps), saved(run_dir, steps)) <= 1e-6
    for kind, name in weights_of(experiment):
        found = distrain.evaluate(run_dir, weights=kind)
        assert found["accuracy"] == pytest.approx(run.summary[name], abs=1e-9)


def weights_of(experiment: str) -> Iterator[tuple[str, str]]:
    """The weights that an experiment's run holds, and the accuracy of each in ``summary.json``."""
    yield "last", "test_accuracy"
    if experiment == "imagenet_resnet50":
        yield "ema", "test_ema_accuracy"
