"""Every strategy trains every task as one process does: the same parameters and the same metrics, of ragged shares."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.harness import run_ranks, soaked
from tests.runs import relative_difference, small, train_on_rank

TASKS = {
    "multilabel": ("data.target=labels", "task=multilabel", "loss=asymmetric", "loss.class_weights=[1,2,0.5,1]"),
    # With an optimizer and a schedule that are not distrain's, and other options for some parameters.
    "regression": (
        *("data.target=numbers", "task=regression", "loss=huber", "loss.delta=0.1"),
        *("optimizer=custom", "optimizer._target_=torch.optim.NAdam", "optimizer.lr=0.01"),
        "optimizer.groups=[{match: '*.bias', kwargs: {betas: [0.7, 0.8]}}]",
        *("scheduler=custom", "scheduler._target_=torch.optim.lr_scheduler.LinearLR"),
        "scheduler.kwargs={total_iters: 4}",
    ),
    "segmentation": (
        *("data.target=mask", "task=segmentation", "model=dilated_cnn", "model.widths=[6,4]", "loss=focal"),
        *("data.augment.flip=true", "data.augment.crop_padding=2", "trainer.test_views=flip"),
    ),
}
STRATEGIES = {
    "ddp": ("strategy=ddp", "trainer.micro_batch_size=2"),
    "fsdp": ("strategy=fsdp", "trainer.micro_batch_size=2", "strategy.block_mb=1e-3"),
    "tensor_parallel": ("strategy=tensor_parallel", "trainer.micro_batch_size=4"),
    "pipeline": ("strategy=pipeline", "strategy.stages=3", "strategy.microbatches=3"),
    "local_sgd": ("strategy=local_sgd", "strategy.sync_every=1", "strategy.warmup_steps=0"),
    "parameter_server": ("strategy=parameter_server",),
}
#: Both batches of 10 and the last one of 7 leave the three ranks unequal shares.
STEPS = 6


def train(folder: Path, task: str, ranks: int, *overrides: str) -> list[dict[str, Any]]:
    optimizer = () if task == "regression" else ("optimizer=sgd", "optimizer.lr=0.05")
    fixed = ("trainer.precision=fp64", "trainer.epochs=2", f"trainer.max_steps={STEPS}", f"run_dir={folder}")
    return run_ranks(train_on_rank, ranks, small(*fixed, *optimizer, *TASKS[task], *overrides))


@functools.cache
def serial(task: str, folder: Path) -> dict[str, Any]:
    return train(folder / task, task, 1)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


#: Cases that every run of the tests trains: each task, and each strategy.
ALWAYS = [
    ("multilabel", "ddp"),
    ("segmentation", "pipeline"),
    ("segmentation", "local_sgd"),
    ("regression", "parameter_server"),
    ("regression", "fsdp"),
]


CASES = dict.fromkeys([*itertools.product(TASKS, ("ddp", "fsdp", "pipeline", "tensor_parallel")), *ALWAYS])


@pytest.mark.parametrize("case", soaked(CASES, ALWAYS), ids="-".join)
def test_a_strategy_trains_a_task_as_one_process_does(case: tuple[str, str], folder: Path) -> None:
    task, strategy = case
    expected = serial(task, folder)
    check(train(folder / f"{task}_{strategy}", task, 3, *STRATEGIES[strategy]), expected)


def test_the_state_of_a_custom_optimizer_moves_from_one_process_to_the_stages_of_a_pipeline(folder: Path) -> None:
    train(folder / "moved", "regression", 1, "checkpoint.every_steps=3", "trainer.max_steps=3")
    runs = train(folder / "moved", "regression", 3, *STRATEGIES["pipeline"], "trainer.max_steps=6")
    assert runs[0]["summary"]["resumed_at_step"] == 3
    check(runs, serial("regression", folder))


def check(runs: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Compares what ranks trained with what one process did; a server has no summary."""
    run = next(run for run in runs if run["summary"])
    assert relative_difference(run["model"], expected["model"]) <= 1e-12
    for name, value in expected["summary"].items():
        if name.startswith(("train_loss", "val_", "best_", "test_")):
            assert run["summary"][name] == pytest.approx(value, rel=1e-9), name
