"""strategy=tensor_parallel trains as one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.harness import run_ranks
from tests.runs import relative_difference, small, train_on_rank

MODELS = "tests.strategies.tensor_parallel.models"
VIT = ("model=custom", f"model._target_={MODELS}.ViT")
GROUPED = ("model=custom", f"model._target_={MODELS}.GroupedNet")
COMMON = ("trainer.max_steps=10", "trainer.epochs=9", "resume=never")
ADAM = ("optimizer=adam", "optimizer.eps=1e-3")
#: Ways of training; a batch has 10 samples, the last one of an epoch 7.
WAYS: dict[str, tuple[str, ...]] = {
    "ViT": (*VIT, *ADAM, "trainer.precision=fp64", "trainer.grad_clip_norm=0.5"),
    "grouped": (*GROUPED, *ADAM, "trainer.precision=fp64", "trainer.micro_batch_size=4"),
    "float32": (*VIT, *ADAM, "trainer.micro_batch_size=4", "trainer.grad_clip_norm=0.5", "optimizer.sam_rho=0.05"),
    "ResNet-18 batch norm": (
        "model=resnet18",
        "model.norm=batch",
        "optimizer=sgd",
        "optimizer.lr=0.001",
        "trainer.precision=fp64",
    ),
    "ResNet-18 group norm": ("model=resnet18", "model.norm=group", "optimizer=sgd", "optimizer.lr=0.001"),
    "CIFAR-10 CNN": ("model=cifar_cnn", "data.height=32", "data.width=32", *ADAM, "trainer.precision=fp64"),
}
#: What each number of ranks trains.
CASES = {2: ["float32", "CIFAR-10 CNN"], 3: ["ViT", "grouped"]}


def train_each(ways: list[str], more: tuple[str, ...], folder: str) -> list[dict[str, Any]]:
    """Trains each in turn in the same processes, because processes are slow to start."""
    return [train_on_rank(small(*COMMON, *WAYS[way], *more, f"run_dir={folder}/{way}")) for way in ways]


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {}


@pytest.mark.parametrize(
    ("ranks", "ways"),
    [
        *(pytest.param(ranks, ways, id=f"{ranks} ranks") for ranks, ways in CASES.items()),
        *(pytest.param(ranks, list(WAYS), id=f"{ranks} ranks, all", marks=pytest.mark.soak) for ranks in CASES),
    ],
)
def test_tensor_parallel_is_the_serial_run(ranks: int, ways: list[str], serial: dict[str, Any], tmp_path: Path) -> None:
    new = [way for way in ways if way not in serial]
    if new:
        serial |= dict(zip(new, run_ranks(train_each, 1, new, (), str(tmp_path / "one"))[0], strict=True))
    several = run_ranks(train_each, ranks, ways, ("strategy=tensor_parallel",), str(tmp_path / "many"), timeout=500)
    for way, *runs in zip(ways, *several, strict=True):
        expected = serial[way]
        for run in runs:
            bound = 1e-11 if "trainer.precision=fp64" in WAYS[way] else 1e-5
            assert relative_difference(run["model"], expected["model"]) <= bound, way
            for count in ("test_correct", "test_count", "samples", "steps"):
                assert run["summary"][count] == expected["summary"][count], (way, count)
            assert run["summary"]["test_loss"] == pytest.approx(expected["summary"]["test_loss"], rel=1e-4)
        for run in runs[1:]:
            assert relative_difference(run["model"], runs[0]["model"]) == 0, way
