"""Resuming on any number of ranks, and under any strategy: what is restored exactly."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from distrain.data.batch import Batch
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.strategies.base import StepResult
from tests.harness import run_ranks
from tests.runs import ALL_AUGMENTATIONS, check, relative_difference, small, trainer_for
from tests.training.resumed import Run, log_of

NORM_NET = ("model=custom", "model._target_=tests.runs.NormNet")


def train(*overrides: str) -> dict[str, Any]:
    """Trains one rank and returns, among others, the samples of its steps."""
    seen: list[list[int]] = []
    configuration = small(*overrides)
    world = World.from_environment()
    check(configuration, world)
    with Runtime(configuration, world) as runtime:
        trainer = trainer_for(configuration, runtime)
        take_step = trainer.strategy.train_step

        def watched(batch: Batch) -> StepResult:
            seen.append(batch.indices.tolist())
            return take_step(batch)

        trainer.strategy.train_step = watched  # type: ignore[method-assign]
        summary = trainer.fit()
        model = {name: tensor.detach().clone() for name, tensor in trainer.strategy.model_state().items()}
    return {"model": model, "seen": seen, "shard": trainer.strategy.data_shard, "summary": summary}


def start(ranks: int, *overrides: str) -> list[dict[str, Any]]:
    return run_ranks(train, ranks, *overrides)


def steps_of(ranks: list[dict[str, Any]]) -> list[list[int]]:
    """The samples of each step over all shards."""
    shares = {rank["shard"]: rank["seen"] for rank in ranks}
    return [[sample for share in step for sample in share] for step in zip(*shares.values(), strict=True)]


def tables(folder: Path) -> list[dict[str, tuple[str, str]]]:
    """The outcome and the reason for each part, for each resume in a run's log."""
    text = log_of(folder)
    found = []
    for each in re.findall(r"this run \(.*\) has:\n((?:  .*\n)+)", text):
        rows = [re.split(r"  +", line.strip(), maxsplit=2) for line in each.splitlines()]
        found.append({part: (how, why) for part, how, why in rows})
    return found


# --- anything to anything --------------------------------------------------------------------------------------------


#: 127 images in batches of 10: 13 steps per epoch, the last of 7 images, so each stop is within an epoch.
CHAIN = (
    *NORM_NET,
    "+model.kwargs.norm=batch",
    "data.train_size=127",
    "data.val_fraction=0",
    "optimizer=sgd",
    "optimizer.momentum=0.9",
    "optimizer.lr=0.01",
    "scheduler=step",
    "scheduler.milestones=[1.0,2.0]",
    "scheduler.gamma=0.5",
    "trainer.epochs=100",
)


def changed_keys(text: str) -> set[str]:
    return {line.split("changed: ")[1].partition(": ")[0] for line in text.splitlines() if "changed: " in line}


def test_the_number_of_ranks_and_the_strategy_may_change_at_every_resume(tmp_path: Path) -> None:
    # Without repeats each sample occurs once in an epoch.
    augmented = (*CHAIN, *ALL_AUGMENTATIONS, "data.augment.repeats=1", "trainer.ema.decay=0.9")
    whole = [train(*augmented, f"run_dir={tmp_path}/whole", "trainer.max_steps=40")]
    steps = []
    pipeline = ("strategy=pipeline", "strategy.schedule=gpipe", "strategy.microbatches=1")
    for end, ranks, strategy in (
        (7, 4, ("strategy=fsdp", "strategy.shard_size=2", "strategy.block_mb=1e-3")),
        (10, 2, pipeline),
        (14, 2, ("strategy=tensor_parallel",)),
        (21, 3, ("strategy=fsdp", "strategy.shard=gradients")),
        (29, 1, ()),
        (40, 3, ("strategy=ddp",)),
    ):
        # What shows and logs a run is not told as a change of the training.
        shown = ("trainer.progress=lines", "runtime.timeout_seconds=111") if end == 40 else ()
        options = (*augmented, *strategy, *shown, f"run_dir={tmp_path}/parts", f"trainer.max_steps={end}")
        last = start(ranks, *options) if ranks > 1 else [train(*options)]
        steps += steps_of(last)
    for rank in last:
        assert relative_difference(rank["model"], whole[0]["model"]) <= 1e-5
    # Each step has the same samples as in the uninterrupted run, not only each epoch.
    assert [sorted(step) for step in steps] == [sorted(step) for step in steps_of(whole)]
    for epoch in range(3):
        samples = [sample for step in steps[13 * epoch : 13 * epoch + 13] for sample in step]
        assert sorted(samples) == list(range(127))
    for key in ("epochs", "samples", "test_count"):
        assert last[0]["summary"][key] == whole[0]["summary"][key]
    for key in ("train_loss", "test_ema_loss"):
        assert last[0]["summary"][key] == pytest.approx(whole[0]["summary"][key], rel=1e-5)
    for table in tables(tmp_path / "parts"):
        hows = {part: how for part, (how, _) in table.items()}
        assert hows["model"] == hows["optimizer"] == hows["average ema"] == hows["data position"] == "exact"
        assert hows["schedule"] == "changed"
        assert hows["random draws"] == "redistributed"
    assert "changed: strategy.name: pipeline → tensor_parallel" in log_of(tmp_path / "parts")
    assert not {"trainer.progress", "runtime.timeout_seconds"} & changed_keys(log_of(tmp_path / "parts"))


def test_the_batch_size_may_change_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    first = train(*CHAIN, f"run_dir={tmp_path}", "trainer.max_steps=5")
    second = train(*CHAIN, f"run_dir={tmp_path}", "data.batch_size=16", "trainer.max_steps=10")
    steps = steps_of([first]) + steps_of([second])
    assert [len(step) for step in steps] == [*[10] * 5, *[16] * 4, 13]
    assert sorted(sample for step in steps for sample in step) == list(range(127))


# --- the table -------------------------------------------------------------------------------------------------------


LOSSY = (*NORM_NET, "+model.kwargs.norm=group", "compression.min_elements=100", "trainer.epochs=100")


def hows(folder: Path) -> dict[str, str]:
    return {part: how for part, (how, _) in tables(folder)[-1].items()}


@pytest.fixture(scope="module")
def lossy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each compressor, a checkpoint in the first epoch of ddp on three ranks."""
    folder = tmp_path_factory.mktemp("lossy")
    found = {}
    for name in ("topk", "powersgd"):
        start(3, "strategy=ddp", f"compression={name}", *LOSSY, f"run_dir={folder}/{name}", "trainer.max_steps=3")
        found[name] = folder / name / "checkpoints" / "step_00000003"
    return found


#: Outcome of most parts if only the number of ranks differs.
MOVED = {
    "model": "exact",
    "optimizer": "exact",
    "local state": "absent",
    "loss scale": "absent",
    "schedule": "changed",
    "data position": "exact",
    "random draws": "redistributed",
    "best metric": "absent",
}


@pytest.mark.parametrize(("name", "factors"), [("topk", "absent"), ("powersgd", "exact")])
def test_residuals_are_redistributed_to_another_number_of_ranks(
    name: str, factors: str, lossy: dict[str, Path], tmp_path: Path
) -> None:
    options = ("strategy=ddp", f"compression={name}", *LOSSY, "trainer.max_steps=4", f"resume={lossy[name]}")
    start(2, *options, f"run_dir={tmp_path}")
    assert hows(tmp_path) == {**MOVED, "residuals": "redistributed", "compressor's factors": factors}
    assert "the sum over 3 ranks, in equal shares among 2 replicas" in log_of(tmp_path)


def test_on_the_same_number_of_ranks_everything_is_exact(lossy: dict[str, Path], tmp_path: Path) -> None:
    options = ("strategy=ddp", "compression=powersgd", *LOSSY, "trainer.max_steps=3")
    start(3, *options, f"run_dir={tmp_path}", f"resume={lossy['powersgd']}")
    same = {"schedule": "exact", "random draws": "exact", "residuals": "exact", "compressor's factors": "exact"}
    assert hows(tmp_path) == {**MOVED, **same}


def test_residuals_are_reset_without_error_feedback_or_in_another_unit(lossy: dict[str, Path], tmp_path: Path) -> None:
    options = (*LOSSY[:-2], "trainer.epochs=100", "trainer.max_steps=4")
    start(2, "strategy=pipeline", *options, f"run_dir={tmp_path}/a", f"resume={lossy['powersgd']}")
    assert hows(tmp_path / "a") == {**MOVED, "residuals": "reset", "compressor's factors": "reset"}
    start(2, "strategy=local_sgd", *options, f"run_dir={tmp_path}/b", f"resume={lossy['topk']}")
    assert hows(tmp_path / "b") == {**MOVED, "residuals": "reset", "compressor's factors": "reset"}
    assert "of gradients; this run compresses differences" in log_of(tmp_path / "b")


def test_diverged_local_sgd_replicas_are_restored_or_averaged(tmp_path: Path) -> None:
    options = ("strategy=local_sgd", "strategy.sync_every=2", *NORM_NET, "+model.kwargs.norm=batch")
    start(2, *options, f"run_dir={tmp_path}/local", "trainer.max_steps=3")
    saved = f"resume={tmp_path}/local/checkpoints/step_00000003"
    start(2, *options, f"run_dir={tmp_path}/same", "trainer.max_steps=3", saved)
    found = hows(tmp_path / "same")
    assert (found["model"], found["optimizer"], found["local state"]) == ("exact",) * 3
    start(2, "strategy=ddp", *options[2:], f"run_dir={tmp_path}/ddp", "trainer.max_steps=4", saved)
    found = hows(tmp_path / "ddp")
    assert (found["model"], found["optimizer"], found["local state"]) == ("redistributed", "redistributed", "reset")


def test_one_process_logs_the_table_too(tmp_path: Path) -> None:
    options = ("trainer.precision=fp16", "optimizer=sgd", "optimizer.momentum=0", "checkpoint.every_steps=7")
    run = Run(tmp_path / "whole", *options, "trainer.max_steps=7")
    assert tables(tmp_path / "whole") == []
    again = Run(tmp_path / "again", *options, "trainer.max_steps=7", f"resume={run.checkpoint(7)}")
    found = hows(again.folder)
    assert found == {
        "model": "exact",
        "optimizer": "absent",
        "local state": "absent",
        "loss scale": "exact",
        "residuals": "absent",
        "compressor's factors": "absent",
        "schedule": "exact",
        "data position": "exact",
        "random draws": "exact",
        "best metric": "exact",
    }
    assert "epoch 1, 20 of 48 samples seen" in log_of(again.folder)
    start(2, "strategy=ddp", *options, f"run_dir={tmp_path}/ddp", f"resume={run.checkpoint(7)}", "trainer.max_steps=7")
    assert (hows(tmp_path / "ddp")["loss scale"], hows(tmp_path / "ddp")["best metric"]) == ("exact", "exact")
    rounded = Run(
        tmp_path / "other", *options[1:], "trainer.precision=fp64", "trainer.max_steps=8", f"resume={run.checkpoint(7)}"
    )
    found = hows(rounded.folder)
    assert (found["model"], found["loss scale"], found["schedule"]) == ("changed", "absent", "changed")
    assert "float32 to float64" in log_of(rounded.folder)
