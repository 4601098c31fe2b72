"""Runs on these ranks, one after another in the same processes, and meetings of the ranks in between."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from distrain.config.schema import Config
from distrain.runtime.garbage_collection import free_finished_trainings
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.strategies.base import strategy_class
from distrain.tasks import base as tasks
from distrain.training.assembly import build_trainer
from distrain.training.run_plan import RunPlan
from distrain.training.trainer import Trainer
from distrain.verification.recorder import RankRecord, Recorder
from distrain.verification.reference import Reference
from distrain.verification.short_runs import ShortRuns


class RankRuns:
    """Does short runs, as one rank.

    Args:
        plan: The user's run, as this rank will do it.
        runs: What all runs have in common.

    Attributes:
        world: This rank's place.
        alone: The place of a process that trains alone, which rank 0 does.
        short: What all runs have in common.
        skipped: Steps whose update all runs leave out; see :class:`~distrain.verification.recorder.Recorder`.
    """

    def __init__(self, plan: RunPlan, runs: ShortRuns) -> None:
        self.world, self.short, self._plan = plan.world, runs, plan
        self.skipped: list[int] = []
        self.alone = dataclasses.replace(plan.world, rank=0, size=1, local_rank=0, local_size=1)

    def plan_of(self, config: Config, world: World) -> RunPlan:
        """The plan of another run on the same data, which needn't be looked for again.

        Args:
            config: The run; it differs from the user's in its strategy and in how it trains.
            world: Of this rank in it.
        """
        # A run changes its task: weights of classes, and methods that are recorded.
        task = tasks.build(config, self._plan.spec)
        return dataclasses.replace(self._plan, config=config, world=world, strategy=strategy_class(config), task=task)

    @contextlib.contextmanager
    def set_up(self, config: Config, world: World) -> Iterator[Trainer]:
        """A run that is set up; inside the block it can train, once."""
        free_finished_trainings()
        plan = self.plan_of(config, world)
        with quiet(), Runtime(config, world) as runtime:
            # The runtime has set the level.
            logging.getLogger("distrain").setLevel(logging.WARNING)
            yield build_trainer(plan, runtime, self.short.splits)

    def record(
        self,
        config: Config,
        world: World,
        reference: Reference,
        prepare: Callable[[Trainer], object] = lambda trainer: None,
        **options: Any,
    ) -> RankRecord:
        """Trains, and returns what was recorded.

        Args:
            config: The run.
            world: Of this rank in it.
            reference: As for :class:`Recorder`.
            prepare: Called with the trainer before its first step.
            **options: As for :class:`Recorder`.
        """
        with self.set_up(config, world) as trainer:
            recorder = Recorder(trainer, reference, skipped=self.skipped, **options)
            prepare(trainer)
            # A server updates as soon as a worker trains, and must be recorded by then.
            trainer.runtime.communicator().barrier()
            trainer.fit()
            return recorder.record

    def meeting(self) -> Runtime:
        """All ranks meet without a run."""
        return Runtime(self.short.config, self.world, keep_logs=False)

    def exchange(self, mine: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What each rank has to tell, in order of rank; anything that JSON can hold."""
        with self.meeting() as runtime:
            return runtime.communicator().all_gather_json(mine, runtime.device)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the runs' own reports from the terminal; warnings and errors are shown."""
    log = logging.getLogger("distrain")
    level = log.level
    try:
        yield
    finally:
        log.setLevel(level)
