"""Compares trainings in stages with trainings of one process, many models in one process group."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from distrain.config.schema import Config
from distrain.optim.optimizers.build import build_optimizer
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.strategies.pipeline.strategy import Pipeline
from distrain.training.assembly import build_loader, build_model
from distrain.training.run_plan import RunPlan
from tests.harness import run_ranks
from tests.runs import relative_difference, small
from tests.strategies.helpers import once

#: Batches of 10 of 47 images, and a last one of 7; 10 steps.
_OPTIONS = (
    "trainer.precision=fp64",
    "optimizer=sgd",
    "optimizer.lr=0.01",
    "optimizer.momentum=0.9",
    "optimizer.weight_decay=0.01",
)
_STEPS = 10
#: Relative difference of the parameters.
BOUND = 1e-11
#: Schedules with the stages per rank.
SCHEDULES = {"1f1b": 1, "interleaved_zero_bubble": 2, "zbv_zero_bubble": 2, "gpipe": 1, "interleaved_1f1b": 2}


def model_options(module: str, kind: str = "''") -> tuple[str, ...]:
    """The model ``kind`` of a module with a function ``build``."""
    return ("model=custom", f"model._target_={module}.build", f"+model.kwargs.kind={kind}")


def pipeline(ranks: int, schedule: str) -> tuple[str, ...]:
    # Sizes of buckets are given, so that no time goes into measuring them.
    buckets = ("strategy.first_bucket_mb=1", "strategy.bucket_mb=1")
    stages = ranks * SCHEDULES[schedule]
    return ("strategy=pipeline", f"strategy.schedule={schedule}", f"strategy.stages={stages}", *buckets)


def train_all(
    folder: str, module: str, kinds: Sequence[str], options: Sequence[tuple[str, ...]]
) -> dict[Any, dict[str, Any]]:
    """What a rank does: trains and evaluates each model with each of the options, all in one process group."""
    found = {}
    common = (*_OPTIONS, *model_options(module), f"run_dir={folder}")
    first = small(*common, *options[0])
    world = World.from_environment()
    with Runtime(first, world, keep_logs=False) as runtime:
        # Each strategy would make groups of its own.
        runtime.mesh = once(runtime.mesh)  # type: ignore[method-assign]
        runtime.duplicate_group = once(runtime.duplicate_group)  # type: ignore[method-assign]
        for more in options:
            config = small(*common, *more)
            for kind in kinds:
                found[kind, more] = train(config, kind, runtime)
    return found


def train(config: Config, kind: str, runtime: Runtime) -> dict[str, Any]:
    model_config = dataclasses.replace(config.model, kwargs={"kind": kind})  # type: ignore[call-arg]
    plan = RunPlan.resolve(dataclasses.replace(config, model=model_config), runtime.world)
    splits = plan.source.load()
    strategy = plan.strategy(plan.config, runtime)
    model = build_model(plan, splits)
    names = list(model.state_dict())
    layout = torch.contiguous_format
    loader = build_loader(plan, strategy, splits, splits.train, layout, training=True)
    testing = build_loader(plan, strategy, splits, splits.test, layout, training=False)
    batches = [next(iter(loader.epoch(0)))]
    strategy.setup(model, plan.task, functools.partial(build_optimizer, plan.config.optimizer), batches[0].inputs)
    batches = [batch for epoch in range(2) for batch in loader.epoch(epoch)][:_STEPS]
    for batch in batches:
        strategy.train_step(batch)
    outputs = [strategy.eval_step(batch).outputs for batch in testing.epoch(0)]
    trained = {name: tensor.detach().clone() for name, tensor in strategy.model_state().items()}
    assert list(trained) == names
    whole = torch.cat([each for each in outputs if each is not None]) if outputs[0] is not None else None
    rows = strategy._split.rows if isinstance(strategy, Pipeline) else []
    return {"model": trained, "outputs": whole, "rows": rows}


def compare(
    folder: Path, module: str, kinds: Sequence[str], ranks: int, schedules: Sequence[str], *more: str
) -> dict[str, float]:
    """Compares runs in stages with runs of one process, in parameters, buffers and outputs of an evaluation.

    Args:
        folder: For the runs.
        module: Has a function ``build`` that makes the models.
        kinds: Which models.
        ranks: Number of ranks.
        schedules: Of the pipelines.
        *more: Further options.

    Returns:
        For each model the largest relative difference of its parameters and buffers.
    """
    common = tuple(option for option in more if not option.startswith("strategy."))
    options = [(*pipeline(ranks, schedule), *more) for schedule in schedules]
    expected = run_ranks(train_all, 1, str(folder / "one"), module, kinds, [common])[0]
    found = run_ranks(train_all, ranks, str(folder / f"{ranks}"), module, kinds, options)
    largest: dict[str, float] = {}
    for kind in kinds:
        single = expected[kind, common]
        for option in options:
            results = [of_rank[kind, option] for of_rank in found]
            difference = relative_difference(results[0]["model"], single["model"])
            largest[kind] = max(largest.get(kind, 0.0), difference)
            assert difference <= BOUND, f"{kind}, {option}: {difference:.1e}"
            rows = results[0]["rows"]
            assert all(row["sends_tensors"] for row in rows[:-1])
            assert not rows[-1]["sends_tensors"]
            (outputs,) = [result["outputs"] for result in results if result["outputs"] is not None]
            torch.testing.assert_close(outputs, single["outputs"], rtol=1e-9, atol=1e-9)
    return largest
