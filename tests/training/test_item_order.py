"""Samples that are read one at a time, and balanced classes, train the same model on any ranks and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.harness import run_ranks
from tests.runs import compose, relative_difference, train_on_rank

#: 34 samples to train on, of three unequal classes; the random pixels of a sample are drawn when it is read.
RUN = (
    "data=custom",
    "data._target_=tests.data.user_data.Unequal",
    "data.batch_size=10",
    "data.eval_batch_size=7",
    "data.augment.flip=true",
    "data.test={count: 9}",
    "data.val_fraction=0.15",
    "data.workers=0",
    "logger=none",
    "trainer.progress=off",
    "trainer.precision=fp64",
    "trainer.epochs=3",
    "runtime.threads=1",
)


@pytest.mark.parametrize("balance", ["sampler", "loss"])
def test_one_rank_trains_the_model_that_three_ranks_train_from_its_checkpoint(balance: str, tmp_path: Path) -> None:
    def run(ranks: int, folder: str, *more: str) -> dict[str, Any]:
        strategy = "single" if ranks == 1 else "ddp"
        options = (*RUN, f"data.balance={balance}", f"strategy={strategy}", f"run_dir={tmp_path / folder}", *more)
        result: dict[str, Any] = run_ranks(train_on_rank, ranks, compose(*options))[0]
        return result

    one = run(1, "one", "checkpoint.every_steps=2", "checkpoint.keep=10")
    # Step 2 lies in the middle of the first epoch of four steps.
    three = run(3, "three", f"resume={tmp_path / 'one' / 'checkpoints' / 'step_00000002'}")
    assert relative_difference(three["model"], one["model"]) < 1e-12
    assert three["summary"]["test_loss"] == pytest.approx(one["summary"]["test_loss"], rel=1e-9)
