"""The training loop. It asks the strategy for steps and knows no strategy by name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

from distrain.checkpoint.progress import Progress
from distrain.data.base import Splits
from distrain.data.batch import Batch
from distrain.data.loader import Loader
from distrain.health.activity import in_phase
from distrain.reporting.loggers.base import Logger
from distrain.runtime import consensus, garbage_collection
from distrain.runtime.consensus import Request, RunControl
from distrain.runtime.device import StepGenerators
from distrain.runtime.runtime import Runtime
from distrain.strategies.base import Strategy
from distrain.tasks.base import Evaluation
from distrain.training import resume
from distrain.training.averaging import Averages
from distrain.training.callback_list import CallbackList
from distrain.training.checkpointing import Checkpointing
from distrain.training.evaluation import EvaluationStopped, evaluate_in_training
from distrain.training.nonfinite import NonFiniteGuard
from distrain.training.pruning import Pruning
from distrain.training.report import Report
from distrain.training.run_plan import RunPlan, total_steps
from distrain.training.stepwise import Steps, exhaust

log = logging.getLogger(__name__)

#: Test samples whose outputs are drawn.
_WATCHED = 32


class Trainer:
    """Trains, evaluates, saves and reports.

    Args:
        plan: The resolved configuration.
        runtime: This rank's surroundings.
        strategy: Set up with model and optimizer.
        splits: The data.
        loaders: This rank's shards: ``train``, ``val`` and ``test``.
        schedule: Factor of the learning rate for a step.
        logger: Takes the metrics; the base class on ranks that don't write.
        callbacks: Called at fixed points, on this rank.
        pruning: Prunes the model at some steps.

    Attributes:
        progress: How far the run has come.
        total_steps: Updates of the whole run.
        report: Sums what steps did and logs it.
        monitor: Says which model is the best, and when to stop early.
        averages: Of the model.
        checkpointing: Saves and restores the run.
    """

    def __init__(
        self,
        plan: RunPlan,
        runtime: Runtime,
        strategy: Strategy,
        splits: Splits,
        loaders: dict[str, Loader],
        schedule: Callable[[int], float],
        logger: Logger,
        callbacks: CallbackList,
        pruning: Pruning,
    ) -> None:
        self.config, self.task, self.monitor = plan.config, plan.task, plan.monitor
        self.runtime, self.strategy = runtime, strategy
        self.splits, self.loaders, self.schedule = splits, loaders, schedule
        self.callbacks, self._pruning = callbacks, pruning
        self.progress = Progress()
        self.total_steps = total_steps(plan.config, len(loaders["train"]))
        self._guard = NonFiniteGuard(plan.config, strategy, strategy.training_group)
        self.report = Report(plan.config, runtime, strategy, plan.task, plan.monitor, self._guard, logger)
        self.averages = Averages(plan.config.trainer, strategy, loaders["train"])
        self.checkpointing = Checkpointing(plan, runtime, strategy, self.averages, splits, self.report, self.callbacks)
        self._generators = StepGenerators(plan.config.seed, runtime.device)
        runtime.activity.find_samples = loaders["train"].sampler.share
        # Published now, so that other ranks can name this rank's samples even if it dies in its first step.
        runtime.activity.shard = strategy.data_shard
        runtime.publish_activity()

    # --- the loop ----------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Trains to the end and returns what ``summary.json`` holds; nothing on a rank that has other work."""
        return self.strategy.run(lambda: exhaust(self.steps()))

    def steps(self) -> Steps:
        """Trains as :meth:`fit`, and yields the number of updates after each; a text sent to it says why to stop."""
        with self.callbacks.ending(self) as end, garbage_collection.frozen_gc():
            try:
                end.summary = yield from self._fit()
            finally:
                self.checkpointing.close()
        return end.summary

    def _fit(self) -> Steps:
        self.runtime.stoppable = True
        self._control = RunControl(self.config, self.runtime, self.strategy.consensus(), self.strategy.training_group)
        finished_summary = self._resume()
        with self.callbacks.fitting(self):
            try:
                stop_reason = yield from self._train()
            except EvaluationStopped as stopped:
                stop_reason = str(stopped)
        self._control.close()
        if stop_reason:
            self.checkpointing.stop_run(stop_reason, self.progress, self._control)
        return self._finish(finished_summary)

    def _train(self) -> Generator[int, str | None, str | None]:
        """Takes steps until the run ends or all ranks agree to stop; returns why they stop."""
        while not self._done():
            loader = self.loaders["train"]
            loader.shard = self.strategy.agree_on_shard()
            self._enter_epoch(loader.shard)
            for batch in self.report.clock.steps(loader.epoch(self.progress.epoch, self.progress.epoch_samples)):
                self.take_step(batch)
                agreed = self._agree()
                if self.progress.step % self.config.trainer.log_every_steps == 0:
                    self.callbacks.notify("on_log", self, self.report.log_steps(self.progress))
                if Request.REWIND in agreed:
                    with self.report.clock.paused():
                        self.checkpointing.rewind(self.progress)
                    self._guard.rewind_requested = False
                if self.checkpointing.is_due(agreed, self.progress):
                    with self.report.clock.paused():
                        self.save()
                asked = yield self.progress.step
                if reason := agreed.reason or asked:
                    return reason
                if self._at_limit():
                    break
            # More than all where a resumed run has fewer samples than the one that was saved.
            if self.progress.epoch_samples >= len(self.splits.train):
                self._end_epoch()
        return None

    def take_step(self, batch: Batch) -> None:
        """One update from this rank's share of a global batch."""
        self._generators.begin_step(self.progress.step, self.strategy.data_shard[0])
        share = self.schedule(self.progress.step) * self.progress.lr_factor
        self.strategy.set_learning_rate(self.config.optimizer.lr * share)
        self._pruning.before_step(self.progress.step)
        sent_before = self.strategy.ledger.total()
        with self.report.memory.step(batch):
            result = self.strategy.train_step(batch)
        counts = self._guard.check_step(result, batch, self.progress.step + 1)
        self.report.add_step(result, self.strategy.ledger.total() - sent_before, counts=counts)
        self.progress.advance(batch.global_count)
        self.averages.after_step(self.progress)
        self.runtime.activity.advance(self.progress.step, self.progress.epoch_samples)
        self.checkpointing.saver.poll()
        self.callbacks.notify("on_step_end", self)

    def _agree(self) -> Request:
        """What all ranks do after this step."""
        rewind = Request.REWIND if self._guard.rewind_requested else Request.NOTHING
        if self.strategy.skips_locally:
            return self._control.agree(rewind)
        return self._control.agree() | rewind

    def _enter_epoch(self, shard: tuple[int, int]) -> None:
        activity, progress = self.runtime.activity, self.progress
        changed = shard != activity.shard or activity.phase != "training"
        activity.enter_epoch(progress.epoch, progress.epoch_samples, self.config.data.batch_size, shard)
        if changed:
            self.runtime.publish_activity()

    def _end_epoch(self) -> None:
        ended, values = self.report.end_epoch(self.progress)
        # If a stop interrupts it, the epoch has not ended, and the run ends it when it is resumed.
        evaluation = self.evaluate("val") if len(self.splits.val) else None
        self.progress = ended
        self.strategy.begin_epoch(ended.epoch)
        saves = self.checkpointing.is_due_after_epoch(self.progress.epoch)
        if evaluation is not None:
            values |= self.report.validation(evaluation)
            self.monitor.note(evaluation, self.progress)
            # Only what is saved can be kept as the best.
            if saves:
                self.checkpointing.note_score(self.progress, self.monitor.value(evaluation))
        self.report.logger.scalars(self.progress.step, values, kind="epoch")
        # Before it is saved, so that a callback's state in the checkpoint knows of this epoch.
        self.callbacks.notify("on_epoch_end", self, values)
        if saves:
            self.save()

    def _done(self) -> bool:
        ended = self.progress.epoch >= self.config.trainer.epochs or self.monitor.gives_up(self.progress)
        return ended or self._at_limit()

    def _at_limit(self) -> bool:
        limit = self.config.trainer.max_steps
        return limit is not None and self.progress.step >= limit

    # --- evaluation, saving, the end ---------------------------------------------------------------------------------

    @in_phase("evaluation")
    def evaluate(self, split: str, watch: Sequence[int] = ()) -> Evaluation:
        """Evaluates a split, also by the averages of the model; all ranks call it together."""
        why_stop, loader = self._control.why_stop_evaluation, self.loaders[split]
        evaluate = partial(evaluate_in_training, self.strategy, self.task, loader, watch, why_stop)
        return self.averages.evaluate(evaluate, why_stop)

    def save(self) -> None:
        """Saves this step, if it is not saved yet; all ranks call it together."""
        self.checkpointing.save(self.progress, self._control)

    def _resume(self) -> dict[str, Any] | None:
        """Goes on from a checkpoint; returns the summary of a run that has ended already."""
        self.progress = self.checkpointing.resume()
        self.strategy.begin_epoch(self.progress.epoch)
        self.report.begin(self.progress.step, self.total_steps)
        summary = resume.finished_summary(self.runtime.run_dir, self.progress.step) if self._done() else None
        if summary is None:
            self.report.begin_log(self.progress)
        else:
            log.info("this run has ended: nothing is left to train, its summary stays as it is")
        if self.runtime.is_main:
            consensus.remove_stop_file(self.runtime.run_dir)
        return summary

    def _finish(self, finished_summary: dict[str, Any] | None) -> dict[str, Any]:
        self.report.clock.lap()
        self.runtime.activity.phase = "finishing"
        self.save()
        try:
            test = self.evaluate("test", range(min(_WATCHED, len(self.splits.test))))
            self.checkpointing.save_with_retries(self.progress, self._control)
            summary = self.report.summary(self.progress, test, self.checkpointing.saver.report())
            summary |= self._pruning.report()
            if finished_summary is None:
                best = self.checkpointing.evaluate_best(self.progress, test, self.loaders["test"], self._control)
                summary |= self.report.best_test(best)
        except EvaluationStopped as stopped:
            self.checkpointing.stop_run(str(stopped), self.progress, self._control)
        if finished_summary is None and self.runtime.is_main:
            self.report.write(summary, self.progress.step, test, self.splits)
        self.checkpointing.check_folder()
        self.report.logger.close()
        return finished_summary or summary
