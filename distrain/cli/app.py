"""A training from a checked configuration to its summary."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from distrain.config.load import to_container
from distrain.config.schema import Config
from distrain.data import manifest
from distrain.data.manifest import data_manifest
from distrain.files.live_text import is_live
from distrain.files.terminal import FILE_ONLY, TERMINAL
from distrain.files.writing import to_json, to_yaml
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.tasks.base import Task
from distrain.tools.planning import expected, plan_file
from distrain.training import auto_format, averaging, micro_batch, resume
from distrain.training.assembly import build_model, build_trainer
from distrain.training.memory import memory_line
from distrain.training.model_notices import model_notices
from distrain.training.progress_bar import ProgressBar, shows_bar
from distrain.training.run_plan import RunPlan
from distrain.training.trainer import Trainer

if TYPE_CHECKING:
    from distrain.tools.planning.auto import Choice

log = logging.getLogger(__name__)

#: The strategy that stands for the one which a plan chooses.
AUTO = "auto"


def train(config: Config, world: World | None = None) -> dict[str, Any]:
    """Checks, loads and trains.

    Args:
        config: The run's configuration.
        world: This rank's place; by default from the launcher's environment.

    Returns:
        What ``summary.json`` holds; nothing on a rank that had other work, such as a parameter server.

    Raises:
        ConfigError: The configuration can't run; raised before any process group forms.
        Failed: The run failed; which rank, where and why was said.
    """
    with prepared(config, world) as trainer:
        summary = trainer.fit()
        log_end(trainer, summary)
    return summary


def log_end(trainer: Trainer, summary: dict[str, Any]) -> None:
    """Says what the run came to: as a table in place of a live line in a terminal, else in one line."""
    if trainer.runtime.is_main:
        bars = [each for each in trainer.callbacks if isinstance(each, ProgressBar) and is_live(TERMINAL)]
        log.info("%s", closing_line(summary, trainer.task), extra=FILE_ONLY if bars else None)
        if line := memory_line(summary):
            log.info("memory in MiB: %s", line, extra=FILE_ONLY if bars else None)
        for bar in bars:
            bar.end(summary, trainer.runtime.run_dir)
        if line := expected.slower_than_planned(summary):
            log.warning("%s", line)


@contextlib.contextmanager
def prepared(config: Config, world: World | None = None) -> Iterator[Trainer]:
    """Checks, loads, and lets the ranks meet; inside this block the trainer can train, once.

    Args:
        config: The run's configuration.
        world: This rank's place; by default from the launcher's environment.

    Raises:
        ConfigError: As :func:`train`.
        Failed: What is done in the block failed; which rank, where and why was said.
    """
    world = world or World.from_environment()
    bar = ProgressBar(shown=world.rank == 0 and shows_bar(config.trainer.progress))
    with contextlib.closing(bar), _prepared(config, world, bar) as trainer:
        yield trainer


@contextlib.contextmanager
def _prepared(config: Config, world: World, bar: ProgressBar) -> Iterator[Trainer]:
    """As :func:`prepared`, with a live line that says what happens."""
    bar.say("choosing a strategy" if config.strategy.name == AUTO else "checking")
    choice = _strategy_choice(config, world)
    config = config if choice is None else choice.config
    named_plan = expected.check(config)
    plan = RunPlan.resolve(config, world)
    trial = plan.check()
    bar.say("loading data")
    with contextlib.closing(plan.load()) as splits:
        plan.check_sizes(splits, trial)
        data = data_manifest(splits)
        changed_data = resume.changed_data(config, data)
        # It needs memory.
        trial.forget_model()
        if plan.world.size > 1:
            bar.say("waiting for all ranks")
        # Closed inside, so that what the runtime says of a failure stands on a line of its own.
        with Runtime(config, plan.world) as runtime, contextlib.closing(bar):
            runtime.activity.phase = "set-up"
            bar.follow(runtime.activity)
            make_model = functools.partial(build_model, plan, splits)
            plan = plan.with_config(auto_format.resolve_auto(config, runtime, splits, plan.task, make_model))
            tried = micro_batch.Tried(
                plan.config, runtime, splits, plan.task, make_model, plan.strategy, plan.memory_format
            )
            plan = plan.with_config(micro_batch.resolve(tried))
            if runtime.is_main and runtime.owner is not None:
                runtime.owner.write_kept("config.yaml", to_yaml(to_container(plan.config)))
                runtime.owner.write_kept(manifest.FILE, to_json(data))
                if choice is not None and choice.plan is not None:
                    runtime.owner.write_kept(plan_file.FILE, choice.plan)
                for note in splits.notes:
                    log.info("%s", note)
                log.info("run folder: %s", runtime.run_dir)
                if choice is not None:
                    log.info("%s", choice.line)
                if changed_data:
                    log.warning("%s", changed_data)
                for notice in model_notices(plan.config, plan.world.size, plan.strategy, plan.dtype, trial):
                    log.warning("%s", notice)
            trainer = build_trainer(plan, runtime, splits)
            if bar.shown:
                trainer.callbacks.append(bar)
            if runtime.is_main:
                trainer.report.predicted = expected.of_run(config, plan.world.size, runtime.run_dir, named_plan)
            yield trainer


def _strategy_choice(config: Config, world: World) -> Choice | None:
    """What ``strategy=auto`` means for this run; ``None`` if a strategy is named. All ranks call it together."""
    if config.strategy.name != AUTO:
        return None
    # Imports what else only the command plan needs.
    from distrain.tools.planning import auto

    return auto.resolve(config, world)


def check(config: Config, world: World) -> None:
    """Refuses what :func:`train` would refuse on these ranks, as far as that needs no data and no other rank.

    Args:
        config: The run's configuration.
        world: A rank's place among the ranks that are to be started.

    Raises:
        ConfigError: The configuration can't run.
    """
    expected.check(config)
    if config.strategy.name == AUTO:
        # Imports what else only the command plan needs.
        from distrain.tools.planning import auto

        auto.check(config, world)
    else:
        RunPlan.resolve(config, world).check(warn=False)


def closing_line(summary: dict[str, Any], task: Task) -> str:
    """What a user wants to know at the end of a run, in one line."""
    score = task.score
    parts = ", ".join(f"{name} {share:.0%}" for name, share in summary["time_share"].items())
    # After a resume, steps and time are those of this start. Older releases did not say where they resumed.
    resumed_at = summary.get("resumed_at_step", 0)
    steps = f"{summary['steps'] - resumed_at} of {summary['steps']}" if resumed_at else str(summary["steps"])
    averages = [f"test_{name}_{score}" for name in averaging.names(task.config.trainer)]
    # Older summaries, of runs that were only continued, may lack them.
    of_averages = "".join(f"{name} {summary[name]:.4f}, " for name in averages if name in summary)
    return (
        f"test_{score} {summary[f'test_{score}']:.4f}, {of_averages}test_loss {summary['test_loss']:.4f} | "
        f"{steps} steps in {summary['wall_seconds']:.1f} s, {summary['images_per_second']:,.0f} images/s | "
        f"{parts}"
    )
