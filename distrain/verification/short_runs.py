"""The short runs that are compared: the user's own configuration, cut to a few steps that have everything in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distrain.config.registry import choice
from distrain.config.schema import Config
from distrain.data.base import Split, Splits
from distrain.errors import ConfigError, config_error
from distrain.models.trial import ModelTrial
from distrain.strategies.base import strategy_class
from distrain.training import batch_sizes
from distrain.training.run_plan import RunPlan

#: Steps between saves of a run that shall not save: more than any short run has.
_NEVER = 1_000_000_000
#: Seconds that ranks wait for the runs of one process, which rank 0 does alone.
_PATIENCE = 6 * 3600.0


@dataclass(frozen=True)
class ShortRuns:
    """What all compared runs have in common.

    Attributes:
        config: The user's configuration, with what the comparison needs changed.
        splits: The samples that are used.
        steps: Updates of each run.
        epoch_steps: Steps of an epoch; a validation follows each.
        last_batch: Samples of an epoch's last batch.
        save_at: The step whose checkpoint the resumed run starts from; ``None`` where there are too few steps.
        folder: Holds the runs' folders.
        changed: What differs from the user's configuration, by key, in words.
    """

    config: Config
    splits: Splits
    steps: int
    epoch_steps: int
    last_batch: int
    save_at: int | None
    folder: Path
    changed: dict[str, str]

    def asked(self, precision: str, name: str) -> Config:
        """The run that the user asked for.

        Args:
            precision: Value of ``trainer.precision``.
            name: Of the run's folder.
        """
        trainer = dataclasses.replace(self.config.trainer, precision=precision)
        return dataclasses.replace(self.config, trainer=trainer, run_dir=str(self.folder / precision / name))

    def saving(self, precision: str, name: str) -> Config:
        """The same, with a checkpoint in the middle."""
        config = self.asked(precision, name)
        saves = dataclasses.replace(config.checkpoint, every_steps=self.save_at)
        return dataclasses.replace(config, checkpoint=saves)

    def resumed(self, precision: str, name: str, checkpoint: Path) -> Config:
        """The same, from a checkpoint on."""
        return dataclasses.replace(self.asked(precision, name), resume=str(checkpoint))

    def serial(self, precision: str, name: str) -> Config:
        """The same training in one process."""
        return as_single(self.asked(precision, name))


def as_single(config: Config) -> Config:
    """The configuration with ``strategy=single`` and without compression."""
    alone = {"strategy": "single", "compression": "none"}
    parts = {group: choice(group, name).schema(name=name) for group, name in alone.items()}
    return dataclasses.replace(config, **parts)


def shortened(config: Config, steps: int) -> Config:
    """The training of so many steps from the beginning, which neither logs nor saves before its end."""
    trainer = dataclasses.replace(
        config.trainer,
        epochs=steps,
        max_steps=steps,
        max_minutes=None,
        log_every_steps=_NEVER,
        progress="off",
        profile_steps=0,
    )
    checkpoint = dataclasses.replace(config.checkpoint, every_epochs=_NEVER, every_steps=None, every_minutes=None)
    logger = choice("logger", "none").schema(name="none")
    return dataclasses.replace(
        config, trainer=trainer, checkpoint=checkpoint, logger=logger, callbacks=[], resume="never"
    )


def cut(plan: RunPlan, trial: ModelTrial, splits: Splits, steps: int, folder: Path) -> ShortRuns:
    """Cuts a run to a few steps in which an epoch ends with a smaller batch.

    Args:
        plan: The user's run.
        trial: Of its model.
        splits: Its samples.
        steps: Updates.
        folder: For the runs.

    Raises:
        ConfigError: There are too few samples.
    """
    config = plan.config
    # A whole batch, and the smaller last one.
    epoch_steps = max(steps // 2, 2)
    save_at = steps // 2 + 1 if steps > 2 else None
    short = shortened(config, steps)
    checkpoint = dataclasses.replace(short.checkpoint, keep=steps)
    runtime = dataclasses.replace(
        config.runtime, setup_timeout_seconds=max(config.runtime.setup_timeout_seconds, _PATIENCE)
    )
    short = dataclasses.replace(short, checkpoint=checkpoint, runtime=runtime)
    evaluated = 2 * config.data.batch_size + 3
    small = dataclasses.replace(
        splits, val=first_samples(splits.val, evaluated), test=first_samples(splits.test, evaluated)
    )
    for count in _sizes(len(splits.train), config.data.batch_size, epoch_steps, plan.world.size):
        chosen = dataclasses.replace(small, train=first_samples(splits.train, count))
        if _fits(short, plan.world.size, chosen, trial):
            last = count % config.data.batch_size or config.data.batch_size
            actual = -(-count // config.data.batch_size)
            changed = {
                "trainer.max_steps": f"{steps}; the learning rate's schedule runs through in them",
                "data": f"the first {count} training samples: {actual} batches an epoch, the last of {last}; "
                f"{len(chosen.val)} validation and {len(chosen.test)} test samples",
            }
            return ShortRuns(short, chosen, steps, actual, last, save_at, folder, changed)
    batch_sizes.check(short, plan.world.size, plan.strategy, small, trial)
    raise config_error("data", f"has too few samples to train on ({len(splits.train)})")


def first_samples(split: Split, count: int) -> Split:
    """The first samples of a split, at most so many."""
    return split if len(split) <= count else split.subset(torch.arange(count))


def _sizes(samples: int, batch_size: int, epoch_steps: int, ranks: int) -> Iterator[int]:
    """Numbers of samples of an epoch, the best first: with a last batch that is smaller and doesn't divide evenly."""
    whole = min(epoch_steps - 1, max(samples - 1, 0) // batch_size) * batch_size
    half = batch_size // 2
    rests = sorted(range(1, batch_size), key=lambda rest: (rest % ranks == 0, rest < ranks, abs(rest - half)))
    yield from (whole + rest for rest in rests if whole + rest <= samples)
    yield min(samples, epoch_steps * batch_size)


def _fits(config: Config, ranks: int, splits: Splits, trial: ModelTrial) -> bool:
    """Whether the model can run every share of these batches, on the ranks and in one process."""
    serial = as_single(config)
    try:
        batch_sizes.check(config, ranks, strategy_class(config), splits, trial)
        batch_sizes.check(serial, 1, strategy_class(serial), splits, trial)
    except ConfigError:
        return False
    return True


def described(config: Config) -> dict[str, Any]:
    """The names of a configuration's main choices."""
    return {
        "model": config.model._target_ if config.model.name == "custom" else config.model.name,
        "data": config.data.name,
        "strategy": config.strategy.name,
        "compression": config.compression.name,
        "optimizer": config.optimizer.name,
        "loss": config.loss.name,
        "task": config.task.name,
    }
