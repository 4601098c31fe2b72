"""The training loop. It asks the strategy for steps and knows no strategy by name."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NoReturn

import torch

from distrain.checkpoint import format as checkpoint_format
from distrain.checkpoint import reader as checkpoint_reader
from distrain.checkpoint.progress import Progress
from distrain.checkpoint.run_owner import RunOwner
from distrain.config.load import to_container
from distrain.config.schema import Config
from distrain.data.base import Splits
from distrain.data.batch import Batch
from distrain.data.loader import Loader
from distrain.data.sampler import batch_share
from distrain.errors import EXIT_STOPPED, Stopped
from distrain.files.writing import write_json
from distrain.health.activity import in_phase
from distrain.reporting.loggers import Logger
from distrain.reporting.metrics import StepClock, Stretch, Totals, peak_memory_mb
from distrain.runtime import consensus, gc_freeze
from distrain.runtime.consensus import Request, RunControl
from distrain.runtime.device import generators
from distrain.runtime.runtime import Runtime
from distrain.strategies.base import Strategy
from distrain.tasks.base import Evaluation, Task
from distrain.training import resume, saver
from distrain.training.callbacks import Callback
from distrain.training.evaluation import evaluate
from distrain.training.nonfinite import NonFiniteGuard, Trail, refuse_nan

log = logging.getLogger(__name__)

_WATCHED = 32
#: Keys that say how or where a run ran, not what it trained.
_NOT_HYPERPARAMETERS = ("run_dir", "resume", "experiment", "runtime.", "checkpoint.", "logger.", "trainer.progress")
_WARMUP = 10
#: Seconds before each attempt to save the last step.
_LAST_SAVES = (0, 1, 2, 4)


class Trainer:
    """Trains, evaluates, saves and reports.

    Args:
        config: The run's configuration.
        runtime: This rank's surroundings.
        strategy: Set up with model and optimizer.
        splits: The data.
        loaders: This rank's shards: ``train``, ``val`` and ``test``.
        schedule: Factor of the learning rate for a step.
        logger: Takes the metrics; the base class on ranks that don't write.
        callbacks: Called at fixed points, on this rank.
    """

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        strategy: Strategy,
        task: Task,
        splits: Splits,
        loaders: dict[str, Loader],
        schedule: Callable[[int], float],
        logger: Logger,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.config = config
        self.runtime = runtime
        self.strategy = strategy
        self.task = task
        self.splits = splits
        self.progress = Progress()
        self.total_steps = total_steps(config, len(loaders["train"]))
        self._loaders = loaders
        self._schedule = schedule
        self._logger = logger
        self.callbacks = list(callbacks)
        self._everyone = strategy.everyone
        self._window = Totals(runtime.device, len(task.metrics))
        self._bytes = 0
        self._logged = (0, 0)
        self._started = time.perf_counter()
        self._checkpoints = checkpoint_format.checkpoints_folder(runtime.run_dir)
        self._saver = saver.build(config, runtime, strategy)
        self._saved_step: int | None = None
        self._best_before: tuple[float | None, int | None] = (None, None)
        runtime.activity.find_samples = functools.partial(batch_share, config.seed, len(splits.train))
        # The others have read it by the time that training begins, should this rank not live long.
        runtime.activity.shard = strategy.data_shard
        runtime.publish_activity()
        self._skipped = 0
        self._generators = generators(runtime.device)
        self._guard = NonFiniteGuard(config, strategy, self._everyone)
        self._trail = Trail(self._everyone, runtime.device)
        self._claim: RunOwner | None = None

    # --- the loop ----------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Trains to the end and returns what ``summary.json`` holds; nothing on a rank that has other work."""
        try:
            with gc_freeze.frozen_gc():
                return self.strategy.run(self._fit)
        finally:
            self._saver.close()

    def _fit(self) -> dict[str, Any]:
        self.runtime.stoppable = True
        self._control = RunControl(self.config, self.runtime, self.strategy.consensus())
        self._resume()
        if self.runtime.is_main:
            consensus.remove_stop_file(self.runtime.run_dir)
        left = max(self.total_steps - self._first_step, 0)
        self._clock = StepClock(self.strategy.stopwatch, min(_WARMUP, left // 2))
        self._notify("on_fit_start")
        try:
            stopped_by = self._train()
        finally:
            self._notify("on_fit_end")
        self._control.close()
        return self._stop(stopped_by) if stopped_by else self._finish()

    def _train(self) -> str | None:
        """Takes steps until the run ends or all ranks agree to stop; returns why they stop."""
        while not self._done():
            loader = self._loaders["train"]
            loader.shard = self.strategy.agree_on_shard()
            self._enter_epoch(loader.shard)
            for batch in self._clock.steps(loader.epoch(self.progress.epoch, self.progress.epoch_samples)):
                self._take_step(batch)
                agreed = self._agree()
                if self.progress.step % self.config.trainer.log_every_steps == 0:
                    self._log()
                if Request.REWIND in agreed:
                    self._rewind()
                if self._save_is_due(agreed):
                    with self._clock.paused():
                        self._save()
                if agreed.reason:
                    return agreed.reason
                if self._at_limit():
                    break
            # More than all where a resumed run has fewer samples than the one that was saved.
            if self.progress.epoch_samples >= len(self.splits.train):
                self._end_epoch()
        return None

    def _take_step(self, batch: Batch) -> None:
        self._seed_step()
        self.strategy.set_learning_rate(self._learning_rate())
        sent = self.strategy.ledger.total()
        result = self.strategy.train_step(batch)
        self._bytes += self.strategy.ledger.total() - sent
        if self._guard.counts(result, batch, self.progress.step + 1):
            self._window.add(result.loss_sum, result.metric_sums, result.count)
        # Where all leave out the same update, it is one.
        self._skipped += result.left_out and (self.runtime.is_main or self.strategy.decides_alone)
        self._advance(batch)
        self._saver.poll()
        self._notify("on_step_end")

    def _agree(self) -> Request:
        back = Request.REWIND if self._guard.wants_back else Request.NOTHING
        if self.strategy.decides_alone:
            return self._control.agree(back)
        return self._control.agree() | back

    def _save_is_due(self, agreed: Request) -> bool:
        every = self.config.checkpoint.every_steps
        due = Request.SAVE in agreed or (every is not None and self.progress.step % every == 0)
        # The end of an epoch saves by itself, with what it found.
        ends_epoch = self.progress.epoch_samples >= len(self.splits.train)
        return due and not (ends_epoch and self._epoch_saves(self.progress.epoch + 1))

    def _epoch_saves(self, epoch: int) -> bool:
        return epoch % self.config.checkpoint.every_epochs == 0

    def _done(self) -> bool:
        return self._at_limit() or self.progress.epoch >= self.config.trainer.epochs

    def _at_limit(self) -> bool:
        limit = self.config.trainer.max_steps
        return limit is not None and self.progress.step >= limit

    def _advance(self, batch: Batch) -> None:
        self.progress.step += 1
        self.progress.epoch_samples += batch.global_count
        self.progress.samples += batch.global_count
        self.runtime.activity.advance(self.progress.step, self.progress.epoch_samples)

    def _enter_epoch(self, shard: tuple[int, int]) -> None:
        position, progress = self.runtime.activity, self.progress
        moved = shard != position.shard or position.phase != "training"
        position.enter_epoch(progress.epoch, progress.epoch_samples, self.config.data.batch_size, shard)
        if moved:
            self.runtime.publish_activity()

    def _learning_rate(self) -> float:
        return self.config.optimizer.lr * self._schedule(self.progress.step)

    def _seed_step(self) -> None:
        # Dropout's draws depend on (seed, step, shard) alone, so a resumed run needs no saved generator states.
        mixed = (self.config.seed * 1_000_003 + self.progress.step) * 65_537 + self.strategy.data_shard[0]
        for generator in self._generators:
            generator.manual_seed(mixed % 2**63)

    # --- between steps -----------------------------------------------------------------------------------------------

    def _log(self) -> None:
        norm = self.strategy.gradient_norm()
        loss, metrics, _ = self._means(self._take_window(settled=False))
        lap = self._clock.lap()
        values = {
            "train/loss": loss,
            **{f"train/{name}": value for name, value in metrics.items()},
            "train/gradient_norm": float(norm),
            "train/learning_rate": self.strategy.optimizer.param_groups[0]["lr"],
            "speed/images_per_second": lap.samples_per_second,
            "speed/step_ms": lap.step_ms,
            **{f"time/{name}": share for name, share in lap.time.shares().items()},
            **self._traffic(),
            **self.strategy.metrics(),
        }
        self._logger.scalars(self.progress.step, values)
        self._notify("on_log", values)

    def _traffic(self) -> dict[str, float]:
        """Bytes a rank sent a step since the last log, the mean of all ranks, and how many times fewer than plain."""
        (step, sent), self._logged = self._logged, (self.progress.step, self._bytes)
        steps = self.progress.step - step
        mine = torch.tensor([self._bytes - sent, steps * self.strategy.uncompressed_bytes_per_step()])
        sent_by_all, plain = self.strategy.total("traffic", mine.to(self.runtime.device), settled=False).tolist()
        return {
            "speed/bytes_sent_per_step": sent_by_all / steps / self.runtime.world.size,
            "speed/compression_ratio": plain / sent_by_all if sent_by_all else 1.0,
        }

    def _take_window(self, *, settled: bool = True) -> list[float]:
        mine = self._window.take()
        counted = torch.cat([mine, mine.new_tensor([self._skipped])])
        self._skipped = 0
        *taken, skipped = self.strategy.total("window", counted, settled=settled).tolist()
        before = self.progress.epoch_sums or [0.0] * len(taken)
        self.progress.epoch_sums = [a + b for a, b in zip(before, taken, strict=True)]
        self.progress.skipped_updates += int(skipped)
        self._guard.look(taken[0])
        return taken

    def _end_epoch(self) -> None:
        self._clock.lap()
        self._take_window()
        loss, metrics, count = self._means(self.progress.epoch_sums)
        self.progress.epoch_sums = []
        self.progress.epoch += 1
        self.progress.epoch_samples = 0
        # Every update of a short epoch may have been left out.
        self.progress.train_loss = loss if count else math.nan
        saves = self._epoch_saves(self.progress.epoch)
        values = {
            "epoch": float(self.progress.epoch),
            "epoch/train_loss": self.progress.train_loss,
            **{f"epoch/train_{name}": value for name, value in metrics.items()},
            "epoch/images_per_second": self._clock.epoch.samples_per_second,
        }
        self._clock.epoch = Stretch()
        if len(self.splits.val):
            found = self._evaluate("val")
            values["epoch/val_loss"] = found.loss
            values |= {f"epoch/val_{name}": found.metrics[name] for name in self.task.metrics}
            self.progress.val_score = found.metrics[self.task.metrics[0]]
            # Only what is saved can be kept as the best.
            if saves:
                self._settle_save()
                self._note_best(self.progress.val_score)
        self._logger.scalars(self.progress.step, values, kind="epoch")
        if saves:
            self._save()
        self._notify("on_epoch_end", values)

    @in_phase("evaluation")
    def _evaluate(self, split: str, watch: Sequence[int] = ()) -> Evaluation:
        loader = self._loaders[split]
        loader.shard = self.strategy.agree_on_shard()
        while True:
            found = evaluate(self.strategy, self.task, loader, self._everyone, watch)
            shard, loader.shard = loader.shard, self.strategy.agree_on_shard()
            # A rank that left meanwhile took its share with it.
            if loader.shard == shard:
                return found

    # --- saving and going on -----------------------------------------------------------------------------------------

    def _note_best(self, score: float) -> None:
        progress, best = self.progress, self.progress.best_score
        if best is None or (score > best if self.task.higher_is_better else score < best):
            self._best_before = best, progress.best_step
            progress.best_score, progress.best_step = score, progress.step

    def _settle_save(self) -> None:
        """Waits for the save under way; one that failed has saved nothing and is not the best."""
        self._saver.wait()
        lost = self._saver.lost
        if lost is not None and lost == self._saved_step:
            self._saved_step = None
            if lost == self.progress.best_step:
                self.progress.best_score, self.progress.best_step = self._best_before

    @in_phase("saving")
    def _save(self) -> None:
        began = time.perf_counter()
        self._settle_save()
        if self._saved_step == self.progress.step:
            return
        if self._claim is not None:
            self._claim.check()
        self._take_window()
        self._logger.flush()
        state = {**self.strategy.state_dict(), "layout": self.strategy.layout, "config": to_container(self.config)}
        refuse_nan(state["model"], self.progress.step)
        self._saver.save(state, asdict(self.progress), began)
        self._saved_step = self.progress.step
        self._control.note_save()
        self._trail.add(checkpoint_format.checkpoint_path(self._checkpoints, self.progress.step), self.progress.step)

    def _save_for_sure(self) -> None:
        """Saves where nothing may be lost: a run that leaves its last step nowhere has not succeeded."""
        for seconds in _LAST_SAVES:
            # The disk may have room again.
            time.sleep(seconds)
            self._save()
            self._settle_save()
            if self._saved_step == self.progress.step:
                return
        raise RuntimeError(f"step {self.progress.step}, the last one, could not be saved")

    def _rewind(self) -> None:
        """Goes back to a checkpoint with everything but the position in the data."""
        with self._clock.paused():
            self._settle_save()
            path = self._trail.back(self.progress.step)
            self.strategy.load_state_dict(checkpoint_reader.load(path)[0])
        self._guard.wants_back = False
        self.progress.rewinds += 1
        log.warning("went back to %s; the data go on after step %d", path, self.progress.step)

    def _stop(self, reason: str) -> NoReturn:
        """Ends the run where all ranks agreed to, to be gone on with later; all of them call it together."""
        self._save_for_sure()
        self._logger.close()
        step = self.progress.step
        if self.runtime.is_main:
            consensus.write_stop_file(self.runtime.run_dir, reason, step, EXIT_STOPPED)
            log.info("stopped by %s at step %d, saved; start the same command again to go on", reason, step)
        raise Stopped(reason, step)

    def _resume(self) -> None:
        if self.runtime.is_main:
            self._claim = RunOwner(self._checkpoints)
        found = resume.resume(self.config, self.runtime, self.strategy, self.task, len(self.splits.train))
        if found is not None:
            self.progress = found.progress
            self._trail.add(found.path, self.progress.step)
            self._saved_step = self.runtime.step = self.progress.step
            self._logged = (self.progress.step, 0)
        self._first_step = self.progress.step
        self._finished = resume.finished(self.runtime.run_dir, self.progress.step) if self._done() else None
        if self._finished is None:
            self._logger.rewind(self.progress.step, mid_epoch=self.progress.epoch_samples > 0)
        else:
            log.info("this run has ended: nothing is left to train, its figures stay")

    # --- the end -----------------------------------------------------------------------------------------------------

    def _finish(self) -> dict[str, Any]:
        self._clock.lap()
        self.runtime.activity.phase = "finishing"
        self._save()
        watch = range(min(_WATCHED, len(self.splits.test)))
        test = self._evaluate("test", watch)
        self._save_for_sure()
        summary = self._summary(test)
        if self._finished is not None:
            summary = self._finished
        elif self.runtime.is_main:
            self._draw(test)
            for name, figure in self.strategy.figures().items():
                self._logger.figure(self.progress.step, name, figure)
            score = self.task.metrics[0]
            numbers = ("train_loss", f"val_{score}", f"test_{score}", "test_loss", "images_per_second")
            final = {f"final/{name}": float(summary[name]) for name in numbers if summary[name] is not None}
            chosen = flatten(to_container(self.config))
            told = {key: value for key, value in chosen.items() if not key.startswith(_NOT_HYPERPARAMETERS)}
            self._logger.hyperparameters(told, final)
            write_json(self.runtime.run_dir / "summary.json", summary)
        if self._claim is not None:
            self._claim.release()
        self._logger.close()
        return summary

    def _summary(self, test: Evaluation) -> dict[str, Any]:
        world, device = self.runtime.world, self.runtime.device
        steps = max(self.progress.step - self._first_step, 1)
        sent = torch.tensor(
            [self._bytes, self.strategy.uncompressed_bytes_per_step()], dtype=torch.int64, device=device
        )
        sent_per_step, uncompressed = self._everyone.all_reduce(sent).tolist()
        shares = self._clock.overall.time.shares()
        summed = self._everyone.all_reduce(torch.tensor(list(shares.values()), dtype=torch.float64, device=device))
        memory = self._everyone.all_reduce(
            torch.tensor(peak_memory_mb(device), dtype=torch.float64, device=device), "max"
        )
        mesh = self.strategy.mesh
        return {
            "strategy": self.config.strategy.name,
            "world_size": world.size,
            "mesh": dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True)) if mesh else {},
            "compression": self.config.compression.name,
            "epochs": self.progress.epoch,
            "steps": self.progress.step,
            "samples": self.progress.samples,
            "skipped_updates": self.progress.skipped_updates,
            "rewinds": self.progress.rewinds,
            "train_loss": self.progress.train_loss if self.progress.epoch else self._partial_train_loss(),
            f"val_{self.task.metrics[0]}": self.progress.val_score,
            **{f"test_{name}": value for name, value in test.metrics.items()},
            "test_loss": test.loss,
            "test_count": test.count,
            "images_per_second": self._clock.overall.samples_per_second,
            "step_ms": self._clock.step_ms(),
            "time_share": {
                name: share / self._everyone.size for name, share in zip(shares, summed.tolist(), strict=True)
            },
            "bytes_sent_per_step": round(sent_per_step / steps),
            "bytes_uncompressed_per_step": uncompressed,
            "bytes_sent_per_step_per_rank": round(sent_per_step / steps / world.size),
            "compression_ratio": uncompressed * steps / sent_per_step if sent_per_step else 1.0,
            "peak_memory_mb": round(float(memory), 1),
            "wall_seconds": round(self.seconds(), 3),
            "checkpoint": self._saver.report(),
            **self.strategy.report(),
        }

    def _partial_train_loss(self) -> float | None:
        loss, _, count = self._means(self.progress.epoch_sums)
        return loss if count else None

    def _means(self, sums: Sequence[float]) -> tuple[float, dict[str, float], float]:
        """Mean loss, the task's metrics by name and the count of summed samples; zeros where there are none."""
        if not sums:
            sums = [0.0] * (2 + len(self.task.metrics))
        loss, *metrics, count = sums
        means = {name: value / max(count, 1) for name, value in zip(self.task.metrics, metrics, strict=True)}
        return loss / max(count, 1), means, count

    def _draw(self, test: Evaluation) -> None:
        if self._logger.accepts_figures:
            for name, figure in self.task.figures(test, self.splits.test).items():
                self._logger.figure(self.progress.step, f"test/{name}", figure)

    def seconds(self) -> float:
        """Seconds since the trainer was made."""
        return time.perf_counter() - self._started

    def _notify(self, event: str, *args: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *args)


def total_steps(config: Config, steps_per_epoch: int) -> int:
    """Updates of the whole run."""
    steps = config.trainer.epochs * steps_per_epoch
    return steps if config.trainer.max_steps is None else min(steps, config.trainer.max_steps)


def flatten(container: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    flat: dict[str, Any] = {}
    for key, value in container.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
