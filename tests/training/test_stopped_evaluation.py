"""A stop during an evaluation: all ranks leave it at once, and the resumed run is the uninterrupted one."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from distrain.checkpoint.state_schema import read_state
from distrain.config.schema import Config
from distrain.data.batch import Batch
from distrain.errors import Stopped
from distrain.runtime import consensus
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.strategies.base import StepResult
from tests.harness import run_ranks, soaked
from tests.runs import small, trainer_for

#: 5 batches of validation and 31 of the test, after epochs of 5 steps.
OPTIONS = ("data.eval_batch_size=1", "trainer.epochs=2", "trainer.log_every_steps=2", "logger=none")
VALIDATION, TEST = 5, 31


def start(config: Config, stop: tuple[int, int] | None) -> dict[str, Any]:
    """Trains, and stops in a batch of evaluation if a rank and the batch's number are given.

    Returns:
        The step reached, the number of batches of evaluation, and the model.
    """
    batches, model = 0, {}
    world = World.from_environment()
    with contextlib.suppress(Stopped), Runtime(config, world) as runtime:
        trainer = trainer_for(config, runtime)
        eval_step = trainer.strategy.eval_step

        def watched(batch: Batch) -> StepResult:
            nonlocal batches
            batches += 1
            if (world.rank, batches) == stop:
                runtime.stop_requested = "SIGTERM"
            return eval_step(batch)

        trainer.strategy.eval_step = watched  # type: ignore[method-assign]
        trainer.fit()
        model = {name: tensor.clone() for name, tensor in trainer.strategy.model_state().items()}
    return {"step": trainer.progress.step, "evaluated": batches, "model": model}


def train(folder: str, stops: list[tuple[int, int] | None], *overrides: str) -> list[dict[str, Any]]:
    """Starts a run once for each stop."""
    consensus._PERIOD = 0.0  # so that the ranks agree after every batch
    config = small(*OPTIONS, *overrides, f"run_dir={folder}")
    return [start(config, stop) for stop in stops]


def summary(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "summary.json").read_text())
    scores = (
        "val_accuracy",
        "best_val_accuracy",
        "best_step",
        "best_epoch",
        "test_accuracy",
        "test_loss",
        "best_test_accuracy",
        "best_test_loss",
        "train_loss",
    )
    return {key: content[key] for key in (*scores, "epochs", "steps", "samples")}


def epoch_rows(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("time", "epoch/images_per_second")
    # An epoch that a resumed run has only to evaluate has no speed; 0 would be a gap in its curve.
    assert all(row.get("epoch/images_per_second") != 0 for row in rows)
    return [{key: row[key] for key in row if key not in timed} for row in rows if row["kind"] == "epoch"]


STRATEGIES = {
    "one": (1, ()),
    "ddp": (2, ("strategy=ddp",)),
    "pipeline": (2, ("strategy=pipeline",)),
    "local_sgd": (2, ("strategy=local_sgd", "strategy.sync_every=3")),
    "parameter_server": (3, ("strategy=parameter_server",)),
}


@pytest.mark.parametrize("name", soaked(STRATEGIES, ("one", "pipeline", "parameter_server")))
def test_the_resumed_run_is_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    ranks, options = STRATEGIES[name]
    last_worker = ranks - 2 if "strategy=parameter_server" in options else ranks - 1
    whole = run_ranks(train, ranks, str(tmp_path / "whole"), [None], *options)
    # In the first validation, in the second, which follows the repeated first, in the test, and in that of the best
    # checkpoint.
    stops = [(last_worker, 2), (0, VALIDATION + 3), (last_worker, VALIDATION + 4), (0, TEST + 3), None]
    parts = run_ranks(train, ranks, str(tmp_path / "parts"), stops, *options)
    assert epoch_rows(tmp_path / "parts") == epoch_rows(tmp_path / "whole")
    assert summary(tmp_path / "parts") == summary(tmp_path / "whole")
    assert not (tmp_path / "parts" / "stopped.json").exists()
    saved = [read_state(tmp_path / name / "checkpoints" / "step_00000010")["progress"] for name in ("parts", "whole")]
    assert saved[0] == saved[1]
    for rank in range(last_worker + 1):
        assert [part["evaluated"] for part in parts[rank]] == [2, VALIDATION + 3, VALIDATION + 4, TEST + 3, 2 * TEST]
        assert [part["step"] for part in parts[rank]] == [5, 10, 10, 10, 10]
        for name, tensor in whole[rank][0]["model"].items():
            assert torch.equal(parts[rank][-1]["model"][name], tensor), name
