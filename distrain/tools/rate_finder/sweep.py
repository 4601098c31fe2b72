"""Trains for some steps, on the ranks and under the strategy of the training, with a rate that rises in each."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from distrain.config.registry import choice
from distrain.config.schema import Config, EmaConfig, SwaConfig
from distrain.data.batch import Batch
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.tools.rate_finder.curve import Curve
from distrain.training import auto_format
from distrain.training.assembly import build_model, build_trainer
from distrain.training.run_plan import RunPlan
from distrain.training.trainer import Trainer
from distrain.verification.rank_runs import quiet
from distrain.verification.short_runs import shortened


def prepare(config: Config, steps: int, lowest: float, run_dir: Path | None) -> Config:
    """The training whose steps are taken: without saves, logs, averages and a schedule of its own.

    Args:
        config: The training.
        steps: Most steps.
        lowest: The first rate.
        run_dir: Its folder; ``None`` before the ranks have met.
    """
    config = shortened(config, steps)
    # An update that is not finite ends the sweep, not the run.
    trainer = dataclasses.replace(
        config.trainer, monitor=None, patience=None, on_nonfinite="skip", ema=EmaConfig(), swa=SwaConfig()
    )
    return dataclasses.replace(
        config,
        trainer=trainer,
        optimizer=dataclasses.replace(config.optimizer, lr=lowest),
        scheduler=choice("scheduler", "constant").schema(name="constant", warmup_epochs=0.0),
        metrics=[],
        run_dir=None if run_dir is None else str(run_dir),
    )


def record(config: Config, world: World, steps: int, lowest: float, highest: float) -> Curve:
    """Sweeps the learning rate; all ranks call it together.

    Args:
        config: Result of :func:`prepare`.
        world: This rank's place.
        steps: Most steps; it ends where the loss diverges.
        lowest: Rate of the first step.
        highest: Rate of the last one.

    Returns:
        What was found; empty on a rank that takes no steps, such as a parameter server.

    Raises:
        ConfigError: The training can't run.
        Failed: A rank failed.
    """
    plan = RunPlan.resolve(config, world)
    trial = plan.check()
    with contextlib.closing(plan.load()) as splits:
        plan.check_sizes(splits, trial)
        del trial
        with quiet(), Runtime(config, world) as runtime:
            # The runtime has set the level. Updates that are skipped are no news here.
            logging.getLogger("distrain").setLevel(logging.ERROR)
            make_model = functools.partial(build_model, plan, splits)
            plan = plan.with_config(auto_format.resolve_auto(config, runtime, splits, plan.task, make_model))
            trainer = build_trainer(plan, runtime, splits)
            growth = (highest / lowest) ** (1 / max(steps - 1, 1))
            trainer.schedule = lambda step: growth**step
            curve = Curve()
            trainer.strategy.run(lambda: _sweep(trainer, steps, lowest, curve))
            trainer.checkpointing.close()
            return curve


def _sweep(trainer: Trainer, steps: int, lowest: float, curve: Curve) -> dict[str, object]:
    """Takes the steps and fills the curve."""
    trainer.strategy.begin_epoch(0)
    group = trainer.strategy.training_group
    for batch in _batches(trainer, steps):
        rate = lowest * trainer.schedule(trainer.progress.step)
        trainer.take_step(batch)
        skipped = trainer.progress.skipped_updates
        loss, *_, count = trainer.report.collect(trainer.progress)
        was_skipped = trainer.progress.skipped_updates > skipped
        curve.add(rate, loss / count if count and not was_skipped else math.nan)
        # Where ranks don't keep step, each has sums of its own.
        diverged = torch.tensor(float(curve.diverged), device=trainer.runtime.device)
        curve.diverged = bool(group.all_reduce(diverged) > 0)
        if curve.diverged:
            break
    return {}


def _batches(trainer: Trainer, steps: int) -> Iterator[Batch]:
    """This rank's share of the batches of so many steps, in as many epochs as that takes."""
    loader = trainer.loaders["train"]
    while trainer.progress.step < steps:
        loader.shard = trainer.strategy.agree_on_shard()
        for batch in loader.epoch(trainer.progress.epoch):
            yield batch
            if trainer.progress.step >= steps:
                return
        trainer.progress.epoch, trainer.progress.epoch_samples = trainer.progress.epoch + 1, 0
