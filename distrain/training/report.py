"""What a run says of its training: metrics at logs and ends of epochs, and ``summary.json`` at its end."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from distrain.checkpoint.progress import Progress
from distrain.config.effects import affected_by
from distrain.config.load import to_container
from distrain.config.schema import Config
from distrain.data.base import Splits
from distrain.files.contained_folder import ContainedFolder
from distrain.files.writing import losing_on_disk_errors, to_json
from distrain.health.mesh_place import sizes_of
from distrain.reporting.loggers.base import Logger
from distrain.reporting.metrics import MetricSums, StepClock, TimedSteps, peak_memory_mb
from distrain.reporting.origin import Origin, as_iso
from distrain.runtime.device import float64_device
from distrain.runtime.runtime import Runtime
from distrain.strategies.base import StepResult, Strategy
from distrain.tasks.base import Evaluation, Task, class_rows
from distrain.training import averaging
from distrain.training.memory import MemoryWatch
from distrain.training.monitor import Monitor
from distrain.training.nonfinite import NonFiniteGuard

#: Most steps at a run's start that are left out of its speed.
_WARMUP_STEPS = 10


class Report:
    """Sums what steps did, and gives it to the logger; all ranks call its methods together.

    Args:
        config: The run's configuration.
        runtime: This rank's surroundings.
        strategy: Says what was sent and where the time went.
        task: Names the metrics.
        monitor: Names the one by which the best model is chosen.
        guard: Looks at each sum of losses.
        logger: Takes the metrics; the base class on ranks that don't write.

    Attributes:
        clock: Times the loop over batches; from :meth:`begin` on.
        parameters: Number of values in the unsplit model's parameters: ``count`` and ``trainable``.
        memory: Watches the memory of steps.
        predicted: What a plan predicts of this run, for the summary; empty if there is no plan.
    """

    clock: StepClock

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        strategy: Strategy,
        task: Task,
        monitor: Monitor,
        guard: NonFiniteGuard,
        logger: Logger,
    ) -> None:
        self.logger = logger
        self._config, self._runtime, self._strategy, self._task, self._guard = config, runtime, strategy, task, guard
        self._monitor = monitor
        self._training_group = strategy.training_group
        self._window = MetricSums(runtime.device, len(task.metrics))
        self._skipped = 0
        self._bytes_sent = 0
        self._first_step = 0
        #: Step of the last log, and the bytes that had been sent by then.
        self._last_log = (0, 0)
        self._start_time = time.perf_counter()
        self.parameters: dict[str, int] = {}
        self.predicted: dict[str, Any] = {}
        self.memory = MemoryWatch(config, runtime, strategy)
        self._origin = Origin(Path.cwd() if runtime.is_main else None)

    def begin(self, first_step: int, total_steps: int) -> None:
        """Training begins, or goes on after ``first_step`` steps."""
        self._first_step = first_step
        self._last_log = (first_step, 0)
        self.clock = StepClock(self._strategy.stopwatch, min(_WARMUP_STEPS, max(total_steps - first_step, 0) // 2))

    def begin_log(self, progress: Progress) -> None:
        """The log begins, or goes on from a checkpoint's position."""
        self.logger.rewind(progress.step, mid_epoch=progress.epoch_samples > 0)
        self.logger.begin(hyperparameters(self._config, sys.argv))

    def seconds(self) -> float:
        """Seconds since the report was made."""
        return time.perf_counter() - self._start_time

    def add_step(self, result: StepResult, bytes_sent: int, *, counts: bool) -> None:
        """Adds one step.

        Args:
            result: The step's.
            bytes_sent: What this rank sent in it.
            counts: Whether its loss and samples count; those of an update that was left out don't.
        """
        self._bytes_sent += bytes_sent
        if counts:
            self._window.add(result.loss_sum, result.metric_sums, result.count)
        # Where all ranks skip the same update, it is one.
        self._skipped += result.skipped and (self._runtime.is_main or self._strategy.skips_locally)

    def collect(self, progress: Progress, *, settled: bool = True) -> list[float]:
        """Adds the sums since the last call, over all ranks, to ``progress``, and returns them.

        Args:
            progress: Its ``epoch_sums`` and ``skipped_updates`` grow.
            settled: All ranks are at the same step; see :meth:`Strategy.reduce_counts`.

        Returns:
            Loss, the task's metrics and count.
        """
        mine = self._window.read_and_reset()
        counted = torch.cat([mine, mine.new_tensor([self._skipped])])
        self._skipped = 0
        *sums, skipped = self._strategy.reduce_counts("window", counted, settled=settled).tolist()
        before = progress.epoch_sums or [0.0] * len(sums)
        progress.epoch_sums = [a + b for a, b in zip(before, sums, strict=True)]
        progress.skipped_updates += int(skipped)
        self._guard.check_loss_sum(sums[0])
        return sums

    def log_steps(self, progress: Progress) -> dict[str, float]:
        """Logs the steps since the last log, and returns what was logged."""
        norm = self._strategy.gradient_norm()
        loss, metrics, _ = self._means(self.collect(progress, settled=False))
        lap = self.clock.lap()
        values = {
            "train/loss": loss,
            **{f"train/{name}": value for name, value in metrics.items()},
            "train/gradient_norm": float(norm),
            "train/learning_rate": self._strategy.optimizer.param_groups[0]["lr"],
            "speed/images_per_second": lap.samples_per_second,
            "speed/step_ms": lap.step_ms,
            **{f"time/{name}": share for name, share in lap.time.shares().items()},
            **self._traffic(progress.step),
            **self._strategy.metrics(),
        }
        self.logger.scalars(progress.step, values)
        return values

    def _traffic(self, step: int) -> dict[str, float]:
        """Bytes a rank sent a step since the last log, the mean of all ranks, and how many times fewer than plain."""
        (last_step, sent), self._last_log = self._last_log, (step, self._bytes_sent)
        steps = step - last_step
        mine = torch.tensor([self._bytes_sent - sent, steps * self._strategy.uncompressed_bytes_per_step()])
        reduced = self._strategy.reduce_counts("traffic", mine.to(self._runtime.device), settled=False)
        sent_by_all, uncompressed = reduced.tolist()
        return {
            "speed/bytes_sent_per_step": sent_by_all / steps / self._runtime.world.size,
            "speed/compression_ratio": uncompressed / sent_by_all if sent_by_all else 1.0,
        }

    def end_epoch(self, progress: Progress) -> tuple[Progress, dict[str, float]]:
        """Closes an epoch's sums.

        Args:
            progress: At the epoch's last sample, and left there.

        Returns:
            The position at the beginning of the next epoch, and what is to be logged.
        """
        self.clock.lap()
        self.collect(progress)
        loss, metrics, count = self._means(progress.epoch_sums)
        # Every update of a short epoch may have been skipped.
        train_loss = loss if count else math.nan
        ended = dataclasses.replace(
            progress, epoch=progress.epoch + 1, epoch_samples=0, epoch_sums=[], train_loss=train_loss
        )
        values = {
            "epoch": float(ended.epoch),
            "epoch/train_loss": train_loss,
            **{f"epoch/train_{name}": value for name, value in metrics.items()},
        }
        # There is no speed of an epoch that is all warm-up, or that a resumed run has only to evaluate.
        if self.clock.epoch.steps:
            values["epoch/images_per_second"] = self.clock.epoch.samples_per_second
        self.clock.epoch = TimedSteps()
        return ended, values

    def validation(self, evaluation: Evaluation) -> dict[str, float]:
        """What is to be logged of a validation."""
        metrics = {f"epoch/val_{name}": evaluation.metrics[name] for name in averaging.validated(self._task)}
        return {"epoch/val_loss": evaluation.loss, **metrics}

    def _means(self, sums: Sequence[float]) -> tuple[float, dict[str, float], float]:
        """Mean loss, the task's metrics by name and the count of summed samples; zeros where there are none."""
        if not sums:
            sums = [0.0] * (2 + len(self._task.metrics))
        loss, *metrics, count = sums
        means = {name: value / max(count, 1) for name, value in zip(self._task.metrics, metrics, strict=True)}
        return loss / max(count, 1), means, count

    def summary(self, progress: Progress, test: Evaluation, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """What ``summary.json`` holds.

        Args:
            progress: At the end of the run.
            test: Evaluation of the test split.
            checkpoint: What the saver reports.
        """
        runtime, strategy, group = self._runtime, self._strategy, self._training_group
        world, device = runtime.world, runtime.device
        steps = max(progress.step - self._first_step, 1)
        sent = torch.tensor(
            [self._bytes_sent, strategy.uncompressed_bytes_per_step()], dtype=torch.int64, device=device
        )
        sent_by_all, uncompressed = group.all_reduce(sent).tolist()
        shares = self.clock.overall.time.shares()
        exact = float64_device(device)
        summed = group.all_reduce(torch.tensor(list(shares.values()), dtype=torch.float64, device=exact)).tolist()
        memory = group.all_reduce(torch.tensor(peak_memory_mb(device), dtype=torch.float64, device=exact), "max")
        loss, _, count = self._means(progress.epoch_sums)
        return {
            "strategy": self._config.strategy.name,
            "world_size": world.size,
            "mesh": sizes_of(strategy.mesh),
            "compression": self._config.compression.name,
            "epochs": progress.epoch,
            "steps": progress.step,
            "resumed_at_step": self._first_step,
            "samples": progress.samples,
            "skipped_updates": progress.skipped_updates,
            "rewinds": progress.rewinds,
            "train_loss": progress.train_loss if progress.epoch else (loss if count else None),
            **{f"val_{name}": progress.val_metrics.get(name) for name in averaging.validated(self._task)},
            f"val_{self._task.score}": progress.val_score,
            "monitor": f"val/{self._monitor.name}",
            f"best_val_{self._monitor.name}": progress.best_score,
            "best_step": progress.best_step,
            "best_epoch": progress.best_epoch,
            "stopped_early": self._monitor.gives_up(progress),
            **{f"test_{name}": value for name, value in test.metrics.items()},
            "test_loss": test.loss,
            "test_count": test.count,
            **self._per_class("test", test),
            "images_per_second": self.clock.overall.samples_per_second,
            "step_ms": self.clock.step_ms(),
            **({"predicted": self.predicted} if self.predicted else {}),
            "time_share": {name: share / group.size for name, share in zip(shares, summed, strict=True)},
            "bytes_sent_per_step": round(sent_by_all / steps),
            "bytes_uncompressed_per_step": uncompressed,
            "bytes_sent_per_step_per_rank": round(sent_by_all / steps / world.size),
            "compression_ratio": uncompressed * steps / sent_by_all if sent_by_all else 1.0,
            "peak_memory_mb": round(float(memory), 1),
            "memory_by_kind_mb": self.memory.summary(group, self.predicted),
            "wall_seconds": round(self.seconds(), 3),
            "checkpoint": checkpoint,
            **strategy.report(),
            "parameters": self.parameters,
            # The start is known by another clock than the calendar's.
            "start": as_iso(time.time() - (time.monotonic() - runtime.start_time)),
            "end": as_iso(time.time()),
            **self._origin.collect(),
        }

    def best_test(self, test: Evaluation | None) -> dict[str, Any]:
        """What ``summary.json`` holds of the best checkpoint's test; nothing where it was not tested."""
        if test is None:
            return {}
        metrics = {f"best_test_{name}": value for name, value in test.metrics.items()}
        return {**metrics, "best_test_loss": test.loss, **self._per_class("best_test", test)}

    def _per_class(self, prefix: str, evaluation: Evaluation) -> dict[str, Any]:
        """Numbers of each class, by its name."""
        classes = self._task.spec.classes
        found = {name: dict(zip(classes, row, strict=True)) for name, row in evaluation.per_class.items()}
        return {f"{prefix}_per_class": found} if found else {}

    def write(self, summary: dict[str, Any], step: int, test: Evaluation, splits: Splits) -> None:
        """Writes ``summary.json``, and logs figures and hyper-parameters; on the rank that writes.

        What can't be written is named in the log; the model is saved by then.
        """
        with losing_on_disk_errors("summary.json"):
            ContainedFolder(self._runtime.run_dir).replace_text("summary.json", to_json(summary))
        with losing_on_disk_errors("Figures"):
            from distrain.reporting import figures

            if self.logger.accepts_figures:
                if test.per_class:
                    table = figures.table(class_rows(self._task.spec.classes, test))
                    self.logger.figure(step, "test/per_class", table)
                for name, figure in self._task.figures(test, splits.test).items():
                    self.logger.figure(step, f"test/{name}", figure)
            for name, figure in self._strategy.figures().items():
                self.logger.figure(step, name, figure)
        score = self._task.score
        numbers = ("train_loss", f"val_{score}", f"test_{score}", "test_loss", "images_per_second")
        final = {f"final/{name}": float(summary[name]) for name in numbers if summary[name] is not None}
        self.logger.hyperparameters(hyperparameters(self._config, sys.argv), final)


#: Hyper-parameters that are shown of every run, besides those that its user chose.
_ALWAYS_SHOWN = frozenset(
    {"data.batch_size", "optimizer.lr", "trainer.epochs", "seed"}
    | {f"{group}.name" for group in ("data", "model", "strategy", "compression", "optimizer", "loss", "scheduler")}
)


def hyperparameters(config: Config, arguments: Sequence[str]) -> dict[str, Any]:
    """The main keys, and those of the command line that affect what is trained, dotted, with their values.

    Args:
        config: The run's configuration.
        arguments: The command line, as in ``sys.argv``.
    """
    typed = {argument.partition("=")[0].lstrip("+~") for argument in arguments[1:] if "=" in argument}

    def is_chosen(key: str) -> bool:
        parts = key.split(".")
        # A group's name, as in model=resnet18, chooses no single key.
        return key in _ALWAYS_SHOWN or any(".".join(parts[:count]) in typed for count in range(2, len(parts) + 1))

    values = {key: value for key, value in flatten(to_container(config)).items() if is_chosen(key)}
    return {key: value for key, value in values.items() if not affected_by(config, key) & {"execution", "identity"}}


def flatten(container: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    flat: dict[str, Any] = {}
    for key, value in container.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
