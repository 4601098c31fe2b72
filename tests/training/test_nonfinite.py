"""NaN in a loss or a gradient of one rank: all ranks stop, skip the update or rewind."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distrain.checkpoint import format as checkpoint_format
from distrain.checkpoint import reader as checkpoint_reader
from distrain.communication.collectives import Communicator
from distrain.config.schema import Config
from distrain.errors import ConfigError, Failed, NonFinite
from distrain.models.base import BlockSequence
from distrain.runtime import consensus
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.strategies.base import StepResult
from distrain.strategies.precision import Precision
from distrain.training import nonfinite
from distrain.training.callbacks import Callback
from distrain.training.nonfinite import NonFiniteGuard, RewindPoints, refuse_nan
from tests.harness import RankFailed, run_ranks, run_ranks_to_the_end
from tests.runs import check, relative_difference, small, trainer_for
from tests.strategies.helpers import ALONE, drawn, single

#: What the faulty blocks of this process make NaN in training: ``nothing``, ``loss`` or ``gradient``.
FAULT = "nothing"


class Faulty(nn.Module):
    """Returns NaN, or the input with a NaN gradient, or the input, by ``FAULT``."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled() and x.device.type == "cpu":
            if FAULT == "loss":
                return x * math.nan
            if FAULT == "gradient":
                return x + (x * 0).sqrt()
        return x


class FaultyNet(BlockSequence):
    """A small CNN with a faulty block."""

    def __init__(self, in_channels: int, num_classes: int, norm: bool = False) -> None:
        layers = [nn.Conv2d(in_channels, 8, 3, stride=2, padding=1), Faulty()]
        first = nn.Sequential(*layers, *([nn.BatchNorm2d(8)] if norm else []), nn.ReLU())
        second = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU())
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
        super().__init__({"first": first, "second": second, "head": head})


class InjectFaults(Callback):
    """Sets the fault of this process in some steps (from 1) and records the parameters after each step."""

    def __init__(self, steps: Mapping[int, str]) -> None:
        self._steps = steps
        self.after: dict[int, Tensor] = {}

    def on_fit_start(self, trainer: Any) -> None:
        self._prepare(trainer.progress.step + 1)

    def on_step_end(self, trainer: Any) -> None:
        named = dict(getattr(trainer.strategy, "_names", {}))
        self.after[trainer.progress.step] = torch.cat([each.detach().clone().flatten() for each in named])
        self._prepare(trainer.progress.step + 1)

    def _prepare(self, step: int) -> None:
        global FAULT
        FAULT = self._steps.get(step, "nothing")


OPTIONS = (
    "model=custom",
    "model._target_=tests.training.test_nonfinite.FaultyNet",
    "scheduler=constant",
    "trainer.log_every_steps=2",
    "checkpoint.keep=99",
    "checkpoint.every_epochs=99",
    "trainer.max_steps=9",
)
STRATEGIES = {
    "single": (1, ()),
    "ddp": (2, ("strategy=ddp",)),
    "fsdp": (2, ("strategy=fsdp", "strategy.block_mb=1e-4")),
    "pipeline": (2, ("strategy=pipeline", "strategy.stages=2", "strategy.microbatches=2")),
    "sync": (4, ("strategy=parameter_server", "strategy.mode=sync", "strategy.servers=2")),
}
SKIPPING_LOCALLY = {
    "local_sgd": (2, ("strategy=local_sgd", "strategy.sync_every=2")),
    "async": (3, ("strategy=parameter_server", "strategy.mode=async")),
}


def config(strategy: str, folder: Path, *overrides: str) -> Config:
    _, options = {**STRATEGIES, **SKIPPING_LOCALLY}[strategy]
    return small(*OPTIONS, *options, f"run_dir={folder}", *overrides)


def ranks(strategy: str) -> int:
    return {**STRATEGIES, **SKIPPING_LOCALLY}[strategy][0]


def train(configuration: Config, rank: int, steps: Mapping[int, str]) -> dict[str, Any]:
    """Trains one rank of a run in which ``rank`` has faults in some steps."""
    # Ranks that synchronise rarely agree only after a period, which is longer than this run.
    consensus._PERIOD = 0.0
    world = World.from_environment()
    with Runtime(configuration, world) as runtime:
        trainer = trainer_for(configuration, runtime)
        faults = InjectFaults(steps if world.rank == rank else {})
        trainer.callbacks.append(faults)
        summary = trainer.fit()
        model = {name: tensor.detach().clone() for name, tensor in trainer.strategy.model_state().items()}
    return {"summary": summary, "model": model, "after": faults.after}


def finite(model: Mapping[str, Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in model.values())


# --- skip ------------------------------------------------------------------------------------------------------------


def test_a_skipped_update_changes_no_state() -> None:
    global FAULT
    torch.manual_seed(0)
    faulty, healthy = FaultyNet(3, 4, norm=True), FaultyNet(3, 4, norm=True)
    healthy.load_state_dict(faulty.state_dict())
    strategies = [single(model, "trainer.on_nonfinite=skip", "optimizer.momentum=0.9") for model in (faulty, healthy)]
    batches = [drawn(6, 3, 8, 8, seed=seed) for seed in range(4)]
    skipped = []
    for number, batch in enumerate(batches):
        for kind in ("loss", "gradient") if number == 2 else ():
            FAULT = kind
            skipped.append(strategies[0].train_step(batch).skipped)
        FAULT = "nothing"
        skipped.append(strategies[0].train_step(batch).skipped)
        assert not strategies[1].train_step(batch).skipped
    assert skipped == [False, False, True, True, False, False]
    # Including BatchNorm's statistics, which the forward pass had already changed.
    for (name, tensor), other in zip(faulty.state_dict().items(), healthy.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name


def test_checking_gradients_changes_no_bit(tmp_path: Path) -> None:
    checked, plain = (
        train(config("single", tmp_path / policy, f"trainer.on_nonfinite={policy}"), 0, {})
        for policy in ("skip", "stop")
    )
    for name, tensor in plain["model"].items():
        assert torch.equal(checked["model"][name], tensor)


@pytest.fixture(scope="module")
def skipped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process that skips two updates."""
    return train(config("single", tmp_path_factory.mktemp("skipped"), "trainer.on_nonfinite=skip"), 0, FAULTS)


FAULTS = {4: "loss", 6: "gradient"}


@pytest.mark.parametrize(
    ("strategy", "clip"), [("ddp", "null"), ("fsdp", "0.5"), ("pipeline", "0.5"), ("sync", "null")]
)
def test_all_ranks_skip_an_update_that_is_not_finite_on_one(
    strategy: str, clip: str, skipped: dict[str, Any], tmp_path: Path
) -> None:
    # In the pipeline, rank 0 has the first stage; the last stage sees no sign of its gradient.
    rank = 0 if strategy == "pipeline" else 1
    options = ("trainer.on_nonfinite=skip", f"trainer.grad_clip_norm={clip}")
    found = run_ranks(train, ranks(strategy), config(strategy, tmp_path / "run", *options), rank, FAULTS)
    expected = skipped if clip == "null" else train(config("single", tmp_path / "one", *options), 0, FAULTS)
    assert relative_difference(found[0]["model"], expected["model"]) < 1e-5
    for each in found[:2]:
        assert torch.equal(each["after"][3], each["after"][4])
        assert torch.equal(each["after"][5], each["after"][6])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["skipped_updates"], summary["rewinds"]) == (2, 0)
    assert summary["train_loss"] == pytest.approx(expected["summary"]["train_loss"], rel=1e-5)
    log = (tmp_path / "run" / "logs" / "rank_0.log").read_text()
    # In the pipeline rank 1 has the loss.
    assert "step 4: the loss of rank 1 (samples" in log
    assert "step 6: the gradient, though no loss, is not finite" in log


def test_one_process_counts_skipped_updates(skipped: dict[str, Any]) -> None:
    assert (skipped["summary"]["skipped_updates"], skipped["summary"]["steps"]) == (2, 9)
    assert finite(skipped["model"])
    assert math.isfinite(skipped["summary"]["train_loss"])


@pytest.mark.parametrize("strategy", SKIPPING_LOCALLY)
def test_ranks_that_train_independently_skip_only_their_own_updates(strategy: str, tmp_path: Path) -> None:
    options = ("trainer.on_nonfinite=skip",)
    found = run_ranks(train, ranks(strategy), config(strategy, tmp_path, *options), 1, FAULTS)
    assert found[0]["summary"]["skipped_updates"] == 2
    assert finite(found[0]["model"])
    assert math.isfinite(found[0]["summary"]["train_loss"])
    if strategy == "local_sgd":
        # Neither step 3 nor step 5 synchronises the ranks.
        assert not torch.equal(found[0]["after"][4], found[0]["after"][3])


def test_too_many_skipped_updates_in_a_row_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nonfinite, "_MAX_SKIPPED_IN_A_ROW", 3)
    steps = {1: "loss", 3: "loss", 4: "loss", 5: "loss", 6: "loss", 7: "loss"}
    with pytest.raises(Failed):
        train(config("single", tmp_path, "trainer.on_nonfinite=skip"), 0, steps)
    assert "NonFinite: 4 gradients in a row are not finite" in capsys.readouterr().err
    global FAULT
    FAULT = "nothing"


def test_an_overflow_of_the_loss_scale_is_not_reported() -> None:
    torch.manual_seed(0)
    strategy = single(
        nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), "trainer.precision=fp16", "trainer.on_nonfinite=skip"
    )
    batch = drawn(4, 3, 2, 2)
    # In the range of fp32, but beyond that of fp16 after scaling.
    batch.inputs *= 1e3
    results = [strategy.train_step(batch) for _ in range(12)]
    assert strategy.precision.state_dict()["scale"] < 2**16
    assert not any(result.skipped for result in results)
    batch.inputs *= math.nan
    for _ in range(16):
        assert not strategy.train_step(batch).skipped or strategy.precision.state_dict()["scale"] == 1
    assert strategy.train_step(batch).skipped


# --- rewind ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_ranks_rewind_to_the_newest_checkpoint_and_then_to_the_one_before(strategy: str, tmp_path: Path) -> None:
    options = ["trainer.on_nonfinite=rewind", "checkpoint.every_steps=2"]
    if strategy == "ddp":
        # The compressor's residuals are restored too.
        options += ["compression=topk", "compression.min_elements=1"]
    steps = {6: "loss", 7: "gradient"}
    found = run_ranks(train, ranks(strategy), config(strategy, tmp_path, *options), 0, steps)
    for each in found[: min(2, ranks(strategy))]:
        after = each["after"]
        assert not torch.equal(after[5], after[4])
        # Recorded before the trainer rewinds, so the rewind shows in the next step.
        assert torch.equal(after[6], after[5])
        assert torch.equal(after[7], after[4])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["rewinds"], summary["skipped_updates"], summary["samples"]) == (2, 2, 48 + 4 * 10)
    log = (tmp_path / "logs" / "rank_0.log").read_text()
    assert [path[-13:] for path in re.findall(r"went back to (\S+);", log)] == ["step_00000004", "step_00000002"]
    # A checkpoint saved right after a rewind holds the restored state, at a later position in the data.
    four, six = (checkpoint_reader.load(tmp_path / "checkpoints" / f"step_{step:08d}") for step in (4, 6))
    for part in ("model", "optimizer"):
        assert all(torch.equal(six[0][part][name], tensor) for name, tensor in four[0][part].items())
    assert (six[1]["samples"], six[1]["rewinds"]) == (48 + 10, 1)
    newest = checkpoint_reader.load(checkpoint_format.list_checkpoints(tmp_path / "checkpoints")[-1])[0]
    assert all(finite(rank_state) for rank_state in newest["compressor"])
    assert (strategy == "ddp") == any(name.startswith("residual") for name in newest["compressor"][0])


def test_ranks_that_train_independently_rewind_when_they_synchronise(tmp_path: Path) -> None:
    options = ("trainer.on_nonfinite=rewind", "checkpoint.every_steps=2", "trainer.max_steps=24")
    found = run_ranks(train, 2, config("local_sgd", tmp_path, *options), 1, {7: "loss"})
    assert found[0]["summary"]["rewinds"] == 1
    assert finite(found[0]["model"])
    for name, tensor in found[0]["model"].items():
        assert torch.equal(tensor, found[1]["model"][name])


def test_a_rewind_without_a_checkpoint_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Failed):
        train(config("single", tmp_path, "trainer.on_nonfinite=rewind"), 0, {2: "loss"})
    assert "there is no checkpoint to rewind to" in capsys.readouterr().err


def test_rewind_points_leave_out_damaged_and_removed_checkpoints(tmp_path: Path) -> None:
    one = train(config("single", tmp_path, "checkpoint.every_steps=2"), 0, {})
    assert one["summary"]["steps"] == 9
    points = RewindPoints(Communicator(), torch.device("cpu"))
    paths = [tmp_path / "checkpoints" / f"step_{step:08d}" for step in (2, 4, 6, 8)]
    for path in [*paths, tmp_path / "checkpoints" / "step_00000099"]:
        points.add(path, 1)
    damaged = paths[2] / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert [points.pop_newest(step) for step in (2, 3, 4)] == [paths[3], paths[1], paths[0]]
    with pytest.raises(NonFinite, match="no checkpoint"):
        points.pop_newest(5)


# --- stop ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [*STRATEGIES, "async"])
def test_the_failure_names_the_rank_and_no_bad_checkpoint_is_saved(strategy: str, tmp_path: Path) -> None:
    rank = 0 if ranks(strategy) == 1 else 1
    # In the pipeline, rank 0 has the faulty layer and rank 1 the loss.
    faulty = 0 if strategy == "pipeline" else rank
    configuration = config(strategy, tmp_path, "checkpoint.every_steps=2")
    found = run_ranks_to_the_end(train, ranks(strategy), configuration, faulty, {6: "loss"})
    failed = [each for each in found if isinstance(each, RankFailed)]
    assert len(failed) == len(found)
    report = json.loads((tmp_path / "failure.json").read_text())
    assert report["rank"] == rank
    saved = checkpoint_format.list_checkpoints(tmp_path / "checkpoints")
    if strategy == "async":
        # The server refuses the gradient before the worker checks its loss.
        assert "NonFinite: " in report["error"]
    else:
        assert report["step"] == 5
        assert report["error"].startswith("NonFinite: the loss is nan in step 6, samples ")
        assert [path.name for path in saved] == ["step_00000002", "step_00000004"]
    assert all(finite(checkpoint_reader.load(path)[0]["model"]) for path in saved)


def test_parameters_that_are_nan_are_not_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A gradient that is NaN does not affect the loss of its step.
    with pytest.raises(Failed):
        train(config("single", tmp_path, "checkpoint.every_steps=3"), 0, {3: "gradient"})
    assert "contains NaN after step 3, which is not saved" in capsys.readouterr().err
    assert checkpoint_format.list_checkpoints(tmp_path / "checkpoints") == []


def test_only_nan_is_refused() -> None:
    # A mask may hold infinity; integers and empty tensors hold nothing that could be NaN.
    fine = {"mask": torch.tensor([-math.inf, math.inf]), "count": torch.tensor(1), "none": torch.zeros(0)}
    refuse_nan({**fine, "half": torch.ones(3, dtype=torch.bfloat16)}, 1)
    with pytest.raises(NonFinite, match=r"layer\.bias contains NaN after step 1"):
        refuse_nan({**fine, "layer.bias": torch.tensor([1.0, math.nan, math.inf])}, 1)


def test_the_deferred_check_of_a_gpu_names_the_first_bad_step() -> None:
    strategy = single(nn.Linear(2, 4))
    guard = NonFiniteGuard(strategy.config, strategy, strategy.training_group)
    guard._deferred = True
    batch = drawn(4, 2)
    fine = StepResult(torch.tensor(1.0), torch.tensor(2), 4)
    for step in range(1, 6):
        assert guard.check_step(replace(fine, loss_sum=torch.tensor(math.inf)) if step in (3, 5) else fine, batch, step)
    guard.check_loss_sum(1.0)
    with pytest.raises(NonFinite, match="the loss is not finite in step 3"):
        guard.check_loss_sum(math.inf)


# --- refused configurations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ("strategy=ddp", "compression=topk", "trainer.on_nonfinite=skip"),
            "trainer.on_nonfinite=skip: would leave NaN in the residuals of compression=topk; choices: stop, rewind",
        ),
        (
            ("strategy=ddp", "compression=auto", "trainer.on_nonfinite=skip"),
            "compression.most_lossy=topk: allows powersgd, but trainer.on_nonfinite=skip: would leave NaN",
        ),
        (
            ("strategy=parameter_server", "strategy.mode=async", "trainer.on_nonfinite=rewind"),
            "trainer.on_nonfinite=rewind: needs workers that keep step, not mode=async; choices: stop, skip",
        ),
    ],
)
def test_configurations_that_can_not_skip_or_rewind_are_refused(overrides: tuple[str, ...], line: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check(small(*overrides), replace(ALONE, size=3))
    assert str(refused.value).startswith(line)


def test_local_sgd_may_skip_with_a_compressor() -> None:
    check(small("strategy=local_sgd", "compression=topk", "trainer.on_nonfinite=skip"), replace(ALONE, size=2))


def test_a_loss_that_is_not_finite_makes_the_gradient_nan() -> None:
    weight = torch.ones(2, requires_grad=True)
    precision = Precision("fp32", torch.device("cpu"), check_gradients=True)
    precision.scale(weight.sum() + math.inf).backward()
    assert weight.grad is not None
    assert bool(weight.grad.isnan().all())
    other = torch.ones(2, requires_grad=True)
    precision.scale(other.sum() * 3).backward()
    assert other.grad is not None
    assert other.grad.tolist() == [3.0, 3.0]
