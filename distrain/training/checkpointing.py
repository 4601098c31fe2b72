"""When and what a run saves, how it resumes, and how it goes back to a checkpoint."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NoReturn

from distrain.checkpoint import format as checkpoint_format
from distrain.checkpoint import reader as checkpoint_reader
from distrain.checkpoint.progress import Progress
from distrain.checkpoint.writer import SaveFailed
from distrain.config.load import to_container
from distrain.data.base import Splits
from distrain.data.loader import Loader
from distrain.data.manifest import data_manifest
from distrain.errors import EXIT_STOPPED, Stopped
from distrain.health.activity import in_phase
from distrain.runtime.consensus import Request, RunControl, write_stop_file
from distrain.runtime.runtime import Runtime
from distrain.strategies.base import Strategy
from distrain.tasks.base import Evaluation
from distrain.training import resume, saver
from distrain.training.averaging import Averages
from distrain.training.callback_list import CallbackList
from distrain.training.evaluation import EvaluationStopped, evaluate_in_training
from distrain.training.nonfinite import RewindPoints, refuse_nan
from distrain.training.report import Report
from distrain.training.run_plan import RunPlan

log = logging.getLogger(__name__)

#: Seconds before each attempt to save the last step.
_LAST_SAVES = (0, 1, 2, 4)


class Checkpointing:
    """Saves a run and restores it; all ranks call its methods together.

    Args:
        plan: The resolved configuration; its monitor says which of two scores is better.
        runtime: This rank's surroundings.
        strategy: Holds the state.
        averages: Of the strategy's model; they are part of the state.
        splits: The data.
        report: Completes the progress that is saved.
        callbacks: May have state of their own.

    Attributes:
        runtime: As above.
        saver: Writes the files.
    """

    def __init__(
        self,
        plan: RunPlan,
        runtime: Runtime,
        strategy: Strategy,
        averages: Averages,
        splits: Splits,
        report: Report,
        callbacks: CallbackList,
    ) -> None:
        self.runtime = runtime
        self.saver = saver.build(plan.config, runtime, strategy)
        self._config, self._task, self._monitor = plan.config, plan.task, plan.monitor
        self._strategy, self._averages = strategy, averages
        self._samples, self._data = len(splits.train), data_manifest(splits)
        self._report, self._callbacks = report, callbacks
        self._folder = checkpoint_format.checkpoints_folder(runtime.run_dir)
        self._rewind_points = RewindPoints(strategy.training_group, runtime.device)
        #: Of the last checkpoint, saved or resumed: its step, and the epochs that had ended.
        self._saved_step: int | None = None
        self._saved_epoch = 0
        self._previous_best: tuple[float | None, int | None, int | None] = (None, None, None)

    def resume(self) -> Progress:
        """Goes on from the checkpoint that ``resume`` names, if there is one."""
        resumed = resume.resume(self._config, self.runtime, self._strategy, self._averages, self._task, self._samples)
        if resumed is None:
            return Progress()
        progress = resumed.progress
        self._monitor.resume(progress)
        self._callbacks.load_state(resumed.callbacks)
        self._rewind_points.add(resumed.path, progress.step)
        self._saved_step = self.runtime.step = progress.step
        self._saved_epoch = progress.epoch
        return progress

    def is_due(self, agreed: Request, progress: Progress) -> bool:
        """Whether to save after a step, by what all ranks agreed on and ``checkpoint.every_steps``."""
        every = self._config.checkpoint.every_steps
        due = Request.SAVE in agreed or (every is not None and progress.step % every == 0)
        # The end of an epoch saves by itself, with what its evaluation gave.
        ends_epoch = progress.epoch_samples >= self._samples
        return due and not (ends_epoch and self.is_due_after_epoch(progress.epoch + 1))

    def is_due_after_epoch(self, epoch: int) -> bool:
        """Whether to save at the end of an epoch, counted from 1."""
        return epoch % self._config.checkpoint.every_epochs == 0

    def note_score(self, progress: Progress, score: float) -> None:
        """Makes the checkpoint that is saved next the best one, if this validation score is the best."""
        self.wait(progress)
        best = progress.best_score
        if self._monitor.is_better(score, best):
            self._previous_best = best, progress.best_step, progress.best_epoch
            progress.best_score, progress.best_step, progress.best_epoch = score, progress.step, progress.epoch

    def wait(self, progress: Progress) -> None:
        """Waits for the save under way; if it failed, ``progress`` no longer names its step as the best."""
        self.saver.wait()
        failed_step = self.saver.failed_step
        if failed_step is not None and failed_step == self._saved_step:
            self._saved_step = None
            if failed_step == progress.best_step:
                progress.best_score, progress.best_step, progress.best_epoch = self._previous_best

    @in_phase("saving")
    def save(self, progress: Progress, control: RunControl) -> None:
        """Saves this position, or begins to in the background; does nothing where it is saved already.

        Raises:
            NonFinite: The model holds NaN.
            TakenOver: Another start of this run has taken the folder.
        """
        start = time.perf_counter()
        self.wait(progress)
        # A checkpoint of an epoch's last step lacks what the end of the epoch adds: the validation, and the best score.
        # An evaluation changes averages.
        same = (self._saved_step, self._saved_epoch) == (progress.step, progress.epoch)
        if same and not self._averages.unsaved:
            return
        self._keep_folder()
        self._report.collect(progress)
        self._report.logger.flush()
        state: dict[str, Any] = {**self._strategy.state_dict(), "layout": self._strategy.layout}
        state |= {"config": to_container(self._config), "data": self._data}
        self._averages.add_to(state)
        refuse_nan(state["model"], progress.step)
        if self.runtime.is_main:
            self._callbacks.add_state(state)
        self.saver.save(state, asdict(progress), start)
        self._saved_step, self._saved_epoch = progress.step, progress.epoch
        control.note_save()
        self._rewind_points.add(checkpoint_format.checkpoint_path(self._folder, progress.step), progress.step)

    def save_with_retries(self, progress: Progress, control: RunControl) -> None:
        """Saves the last step, which must not be lost; a full disk may have room again after some seconds.

        Raises:
            SaveFailed: It could not be saved.
            TakenOver: Another start of this run has taken the folder.
        """
        for seconds in _LAST_SAVES:
            time.sleep(seconds)
            self.save(progress, control)
            self.wait(progress)
            if not self._folder_is_complete(progress.step):
                self._saved_step = None
            if self._saved_step == progress.step:
                return
        problem = self.saver.failure or "the run folder was removed each time"
        raise SaveFailed(f"step {progress.step}, the last one, could not be saved: {problem}")

    def stop_run(self, reason: str, progress: Progress, control: RunControl) -> NoReturn:
        """Saves the run before its end, at a step on which all ranks agreed, so that it can be resumed.

        Raises:
            Stopped: Always; everything is saved.
        """
        self.save_with_retries(progress, control)
        self._report.logger.close()
        if self.runtime.is_main:
            write_stop_file(self.runtime.run_dir, reason, progress.step, EXIT_STOPPED)
            log.info("stopped by %s at step %d, saved; %s", reason, progress.step, self.runtime.how_to_resume())
        raise Stopped(reason, progress.step)

    def _keep_folder(self) -> None:
        """Writes the run's folder anew if it was removed; rank 0 does that for all."""
        owner = self.runtime.owner
        if owner is None or not self.runtime.is_main:
            return
        try:
            owner.restore()
        except OSError as error:
            # Saving will fail too, and tell all ranks.
            log.error("%s can't be written: %s", error.filename, error.strerror)

    def _folder_is_complete(self, step: int) -> bool:
        """Whether the run's folder holds this step's checkpoint, and what belongs beside it; all ranks call it."""
        owner, complete = self.runtime.owner, True
        if owner is not None and self.runtime.is_main:
            owner.check()
            complete = owner.is_complete() and checkpoint_format.checkpoint_path(self._folder, step).is_dir()
        answers = self._strategy.training_group.all_gather_json({"complete": complete}, self.runtime.device)
        return all(answer["complete"] for answer in answers)

    def rewind(self, progress: Progress) -> None:
        """Restores the newest checkpoint, but not the position in the data.

        Raises:
            NonFinite: There is no checkpoint to go back to.
        """
        self.wait(progress)
        path = self._rewind_points.pop_newest(progress.step)
        self._load(checkpoint_reader.load(path)[0])
        progress.rewinds += 1
        log.warning("went back to %s; the data go on after step %d", path, progress.step)

    @in_phase("evaluation")
    def evaluate_best(
        self, progress: Progress, last: Evaluation, loader: Loader, control: RunControl
    ) -> Evaluation | None:
        """Evaluates the best checkpoint of a run that has ended and is saved.

        The model of the last step is loaded again after it, but what the strategy has counted for reports may be lost.

        Args:
            progress: At the end of the run.
            last: The evaluation of the last step.
            loader: The test samples.
            control: Says when to stop.

        Returns:
            The evaluation; ``None`` if no checkpoint is the best, or it can't be read, which the log says.

        Raises:
            EvaluationStopped: All ranks stop.
            RuntimeError: The last step can't be read back.
        """
        if progress.best_step is None or progress.best_step == progress.step:
            return last if progress.best_step is not None else None
        problem = self._put_back(progress.best_step)
        if problem is not None:
            log.warning("the best checkpoint was not tested: %s", problem)
            return None
        try:
            why_stop = control.why_stop_evaluation
            found = self._averages.evaluate(
                lambda: evaluate_in_training(self._strategy, self._task, loader, (), why_stop), why_stop
            )
        except EvaluationStopped:
            self._put_last_back(progress)
            raise
        self._put_last_back(progress)
        return found

    def _put_last_back(self, progress: Progress) -> None:
        problem = self._put_back(progress.step)
        if problem is not None:
            raise RuntimeError(f"the last step was saved, and can't be read: {problem}")

    def _put_back(self, step: int) -> str | None:
        """Gives the strategy the state of this run's checkpoint of a step; returns why that is not possible."""
        path = checkpoint_format.checkpoint_path(self._folder, step)
        loaded = resume.read(self.runtime, self._strategy.training_group, self._task, path)
        if isinstance(loaded, str):
            return loaded
        state, position = loaded
        self._strategy.begin_epoch(position.epoch)
        self._load(state)
        return None

    def _load(self, state: Mapping[str, Any]) -> None:
        self._strategy.load_state_dict(state)
        self._averages.load(state)

    def check_folder(self) -> None:
        """Checks at the end of the run that its folder is still there; rank 0 does that for all.

        Raises:
            TakenOver: Another start of this run has taken the folder.
            RuntimeError: The folder was removed after the last save.
        """
        owner = self.runtime.owner
        if owner is not None and self.runtime.is_main:
            owner.check()
            if not owner.is_complete():
                raise RuntimeError(f"the run folder {owner.run_dir} was removed after the last step was saved")

    def close(self) -> None:
        """Ends the saver, and the log if an error has left it open."""
        self.saver.close()
        self._report.logger.fail()
