"""``distrain.Trainer``: a training of objects whose steps a Python program takes one by one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from distrain.api.fit import prepare
from distrain.api.run import Run
from distrain.api.settings import merge
from distrain.api.surroundings import restored_surroundings
from distrain.checkpoint.progress import Progress
from distrain.cli import app
from distrain.config.registry import choice
from distrain.errors import ConfigError, Stopped, config_error
from distrain.models.python_object import ModelObject
from distrain.runtime import program
from distrain.runtime.garbage_collection import free_finished_trainings
from distrain.strategies.auto import AutoConfig
from distrain.strategies.base import Strategy, strategy_class
from distrain.tools.launching import slurm
from distrain.training import trainer as training
from distrain.training.callbacks import Callback
from distrain.training.stepwise import Steps

#: Why a run stops whose steps a program no longer takes.
_LEFT = "the program"


class Trainer:
    """Trains as :func:`distrain.fit`, and hands control to the program after every update.

    ::

        with distrain.Trainer(model, (x, y), epochs=3) as trainer:
            for step in trainer:
                if step % 100 == 0:
                    print(step, trainer.evaluate("val")["accuracy"])
        print(trainer.run.summary)

    Under torchrun all ranks take the same steps and call the same methods after them. A program that leaves the loop
    early, and then the ``with`` block, saves the run: the same call with ``run_dir=`` goes on.

    Args:
        model: As for :func:`distrain.fit`, as all arguments.
        train: Samples to train on.
        val: Samples for validation.
        test: Samples for the test at the end.
        classes: Names of the classes, or their number.
        callbacks: What is called at fixed points.
        config_dir: A folder with further choices.
        keys: Values by dotted key.
        **settings: Choices, and values by keyword.

    Raises:
        ConfigError: An argument is refused.
    """

    def __init__(
        self,
        model: ModelObject | str,
        train: Any,
        *,
        val: Any = None,
        test: Any = None,
        classes: int | Sequence[str] | None = None,
        callbacks: Sequence[Callback | str | Mapping[str, Any]] = (),
        config_dir: str | os.PathLike[str] | None = None,
        keys: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        if "nproc" in settings:
            problem = "a program that takes the steps itself runs on every rank; start it under torchrun"
            raise ConfigError("nproc", settings["nproc"], problem)
        slurm.set_torchrun_variables(os.environ)
        self._training = prepare(model, train, val, test, classes, callbacks, config_dir, merge(settings, keys or {}))
        problem = "has ranks that take no steps of their own; train with distrain.fit"
        options = self._training.config.strategy
        if isinstance(options, AutoConfig):
            options.strategies = [name for name in options.strategies if _takes_steps(choice("strategy", name).target)]
            if not options.strategies:
                raise ConfigError("strategy.strategies", "parameter_server", problem)
        if not _takes_steps(strategy_class(self._training.config)):
            raise ConfigError("strategy", options.name, problem)
        self._stack = contextlib.ExitStack()
        self._inner: training.Trainer | None = None
        self._steps: Steps | None = None
        self._began = False
        self._progress: Progress | None = None
        self._run: Run | None = None

    def __enter__(self) -> Trainer:
        with contextlib.ExitStack() as stack:
            stack.enter_context(restored_surroundings())
            stack.enter_context(program.called_as("distrain.Trainer"))
            stack.enter_context(self._training.objects())
            self._inner = stack.enter_context(app.prepared(self._training.config))
            self._steps = self._inner.steps()
            self._stack = stack.pop_all()
        return self

    def __iter__(self) -> Iterator[int]:
        """The number of updates, after each of them, until the run ends.

        Raises:
            Stopped: The run was stopped on request; everything is saved.
        """
        trainer = self._entered()
        while self._steps is not None:
            self._began = True
            try:
                step = next(self._steps)
            except StopIteration as end:
                self._steps = None
                app.log_end(trainer, end.value)
            else:
                yield step

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        trainer = self._entered()
        end = error
        if error is None and self._steps is not None and self._began:
            end = self._stop(self._steps)
        # Also when no step was taken: the generator would not do it then.
        trainer.checkpointing.close()
        result = self._training.result(trainer) if error is None and self._began else None
        self._stack.__exit__(None if end is None else type(end), end, None if end is None else end.__traceback__)
        # Nothing here must keep the process group, which has ended.
        self._progress, self._inner, self._steps = trainer.progress, None, None
        del trainer
        free_finished_trainings()
        if result is not None:
            self._run = self._training.finish(result)

    @staticmethod
    def _stop(steps: Steps) -> Stopped:
        """Saves the run, whose steps the program no longer takes."""
        try:
            steps.send(_LEFT)
        except Stopped as stopped:
            return stopped
        raise AssertionError("a run that is told to stop does so")

    @property
    def step(self) -> int:
        """Updates done."""
        return (self._progress or self._entered().progress).step

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return (self._progress or self._entered().progress).epoch

    def evaluate(self, split: str = "val") -> dict[str, Any]:
        """Evaluates the model as it is; all ranks call it together.

        Args:
            split: ``train``, ``val`` or ``test``.

        Returns:
            ``loss``, ``count`` and the metrics of the task, such as ``accuracy``.

        Raises:
            ConfigError: There is no such split, or it has no samples.
        """
        trainer = self._entered()
        if split not in trainer.loaders or not len(trainer.loaders[split]):
            raise ConfigError("split", split, "has no samples here", list(trainer.loaders))
        with trainer.report.clock.paused():
            result = trainer.evaluate(split)
        return {"loss": result.loss, "count": result.count, **result.metrics}

    def save(self) -> None:
        """Saves a checkpoint of this step, and waits until it is complete; all ranks call it together."""
        trainer = self._entered()
        with trainer.report.clock.paused():
            trainer.save()
            trainer.checkpointing.wait(trainer.progress)

    @property
    def run(self) -> Run:
        """The run, after the ``with`` block.

        Raises:
            ConfigError: The block has not ended, or no step was taken in it.
        """
        if self._run is None:
            raise config_error(
                "run", "is known after the block of `with distrain.Trainer(…)`, if steps were taken in it"
            )
        return self._run

    def _entered(self) -> training.Trainer:
        if self._inner is None:
            raise config_error("distrain.Trainer", "is used inside the block of `with distrain.Trainer(…) as trainer:`")
        return self._inner


def _takes_steps(strategy: Any) -> bool:
    """Whether all ranks of a strategy take the training's steps."""
    return strategy.run is Strategy.run
