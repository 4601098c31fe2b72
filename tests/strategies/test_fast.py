"""What experiment=cifar10_fast is made of keeps the promises: one process's training, and resume to the bit."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from tests.harness import run_ranks, soaked
from tests.runs import compose, relative_difference, small, train_on_rank

#: Everything at once, small: the sizes don't divide, and groups freeze and lookahead merges within the run.
RECIPE = (
    "scheduler=triangle",
    "loss.label_smoothing=0.2",
    "data.augment.flip=alternating",
    "data.augment.crop_padding=2",
    "data.augment.crop_border=reflect",
    "optimizer.lr=0.02",
    "optimizer.weight_decay=0.01",
    "optimizer.lookahead.every=3",
    "trainer.test_views=flip_translate",
    "trainer.max_steps=8",
    "trainer.epochs=9",
    "resume=never",
)
MODELS = {
    "sgd": (
        "model=airbench_cnn",
        "model.widths=[4,6,6]",
        "data.height=9",
        "data.width=9",
        "optimizer=sgd",
        "optimizer.momentum=0.85",
        "optimizer.nesterov=true",
        "optimizer.groups=[{match: '*.norm?.bias', lr_factor: 8, weight_decay: 0}, {match: whitening.*, epochs: 1}]",
    ),
    # Without BatchNorm, whose statistics are of microbatches in a pipeline and of shares with a parameter server.
    "muon": (
        "model=simple_cnn",
        "optimizer=muon",
        "optimizer.groups=[{match: '*.conv.bias', lr_factor: 4, epochs: 1}]",
    ),
}


def trained(folder: Path, ranks: int, *overrides: str) -> list[dict[str, Any]]:
    return run_ranks(train_on_rank, ranks, small(*RECIPE, *overrides, f"run_dir={folder}"))


@functools.cache
def serial(optimizer: str, folder: Path) -> dict[str, Any]:
    return trained(folder / optimizer, 1, *MODELS[optimizer])[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


#: Optimizers with the strategies under which they train.
TRAINED = [("sgd", "ddp"), ("muon", "ddp"), ("muon", "pipeline"), ("muon", "parameter_server")]


@pytest.mark.parametrize("case", soaked(TRAINED, TRAINED[::2]), ids="-".join)
def test_the_recipe_is_the_serial_run_under_any_strategy(case: tuple[str, str], folder: Path) -> None:
    optimizer, strategy = case
    expected = serial(optimizer, folder)
    first, second = trained(folder / f"{optimizer}_{strategy}", 2, *MODELS[optimizer], f"strategy={strategy}")
    assert first["summary"]["test_correct"] == expected["summary"]["test_correct"]
    assert first["summary"]["test_count"] == 31
    # A rank may hold a part of the model.
    assert relative_difference({**second["model"], **first["model"]}, expected["model"]) <= 1e-5


@pytest.mark.parametrize("strategy", soaked(["ddp", "parameter_server"], ["ddp"]))
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(strategy: str, tmp_path: Path) -> None:
    # The checkpoint lies between two merges, and before the step at which a group's training ends.
    optimizer = "sgd" if strategy == "ddp" else "muon"
    options = (*MODELS[optimizer], f"strategy={strategy}", "checkpoint.every_steps=4", "checkpoint.keep=9")
    whole = trained(tmp_path / "whole", 2, *options)[0]
    checkpoint = tmp_path / "whole" / "checkpoints" / "step_00000004"
    again = trained(tmp_path / "again", 2, *options, f"resume={checkpoint}")[0]
    assert again["model"].keys() == whole["model"].keys()
    assert all(again["model"][name].equal(tensor) for name, tensor in whole["model"].items())


def test_the_experiment_is_an_ordinary_configuration() -> None:
    config = compose("experiment=cifar10_fast")
    assert (config.model.name, config.optimizer.name, config.scheduler.name) == ("airbench_cnn", "sgd", "triangle")
    # The paper's rate for sums over 1024 samples, as the rate for means; its decay doesn't depend on the batch.
    assert config.optimizer.lr == pytest.approx(11.5 / (1 + 1 / (1 - 0.85)) * config.data.batch_size / 1024)
    assert config.optimizer.weight_decay == pytest.approx(0.0153 / 11.5)
    assert config.optimizer.groups[0].weight_decay == pytest.approx(0.0153 / 11.5 / 64)
    assert config.optimizer.lookahead.keep == pytest.approx(0.95**5)
