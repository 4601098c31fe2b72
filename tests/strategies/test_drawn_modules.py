"""Of many drawn networks each trains as plain torch does, or is refused before the first step, or the log says why not.

Networks that can't be equal on several ranks (their results depend on how a batch is divided) must be announced.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any

import pytest
import torch

from distrain.config.schema import Config
from distrain.errors import ConfigError
from distrain.optim.optimizers.build import build_optimizer
from distrain.runtime.device import seed_everything
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.training.assembly import build_loader, build_model
from distrain.training.model_notices import model_notices
from distrain.training.run_plan import RunPlan
from tests.harness import run_ranks
from tests.runs import relative_difference, small
from tests.strategies import drawn
from tests.strategies.helpers import once

#: How many networks are drawn, and how many train together in a process. `make test` draws the first of them only.
COUNT, TOGETHER = 300, 60
BOUND = 1e-9
OPTIONS = (
    "model=custom",
    "model._target_=tests.strategies.drawn.model",
    "+model.kwargs.seed=0",
    "data.height=6",
    "data.width=6",
    # 21 images to train on: batches of 6, and a last one of 3.
    "data.train_size=23",
    "data.batch_size=6",
    "trainer.precision=fp64",
    "trainer.memory_format=contiguous",
    "optimizer=sgd",
    "optimizer.lr=0.05",
    "optimizer.momentum=0.9",
)
#: What announces that a network is not trained as in one process.
ANNOUNCED = ("so results differ from those of one process", "BatchNorm layers normalise each microbatch by its own")
Outcome = dict[str, Any]


class Said(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def train(plan: RunPlan, runtime: Runtime, said: Said) -> Outcome:
    """Trains for an epoch, as a run does; what is refused or announced is told."""
    try:
        trial = plan.check()
        splits = plan.source.load()
        plan.check_sizes(splits, trial)
        notices = model_notices(plan.config, plan.world.size, plan.strategy, plan.dtype, trial)
        strategy = plan.strategy(plan.config, runtime)
        model = build_model(plan, splits)
        loader = build_loader(plan, strategy, splits, splits.train, torch.contiguous_format, training=True)
        make_optimizer = functools.partial(build_optimizer, plan.config.optimizer)
        strategy.setup(model, plan.task, make_optimizer, next(loader.epoch(0)).inputs)
    except ConfigError as error:
        return {"refused": str(error)}
    for batch in loader.epoch(0):
        strategy.train_step(batch)
    announced = [line for line in [*notices, *said.lines] if any(text in line for text in ANNOUNCED)]
    return {"announced": announced, "model": _tensors(strategy.model_state())}


def plain(plan: RunPlan) -> Outcome:
    """Trains as a loop of plain torch does."""
    splits = plan.source.load()
    # Of the strategy only the shard is needed, which is the whole batch for the class.
    loader = build_loader(plan, plan.strategy, splits, splits.train, torch.contiguous_format, training=True)  # type: ignore[arg-type]
    seed_everything(plan.config.seed)
    network = drawn.model(3, 4, plan.config.model.kwargs["seed"]).double().train()  # type: ignore[attr-defined]
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9, foreach=False, fused=False)
    for batch in loader.epoch(0):
        optimizer.zero_grad()
        (drawn.loss_sum(network(batch.inputs), batch.targets) / len(batch)).backward()
        optimizer.step()
    return {"model": _tensors(network.state_dict())}


def _tensors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Without extra state that is no tensor."""
    return {name: value.detach().clone() for name, value in state.items() if isinstance(value, torch.Tensor)}


def train_drawn(seeds: range, folder: str, *options: str) -> list[Outcome]:
    """What a rank does: trains each network under a strategy, all in one process group."""
    config = small(*OPTIONS, *options, f"run_dir={folder}")
    outcomes = []
    with Runtime(config, World.from_environment(), keep_logs=False) as runtime:
        # Each strategy would make groups of its own, and hundreds of them would run out of threads.
        runtime.mesh = once(runtime.mesh)  # type: ignore[method-assign]
        runtime.duplicate_group = once(runtime.duplicate_group)  # type: ignore[method-assign]
        logger, said = logging.getLogger("distrain"), Said()
        logger.addHandler(said)
        for seed in seeds:
            said.lines.clear()
            outcomes.append(train(_plan(config, seed), runtime, said))
        logger.removeHandler(said)
    return outcomes


def _plan(config: Config, seed: int) -> RunPlan:
    model = dataclasses.replace(config.model, kwargs={"seed": seed})  # type: ignore[call-arg]
    return RunPlan.resolve(dataclasses.replace(config, model=model), World.from_environment())


def plain_drawn(seeds: range, refused: list[bool]) -> list[Outcome | None]:
    config = small(*OPTIONS)
    return [None if is_refused else plain(_plan(config, seed)) for seed, is_refused in zip(seeds, refused, strict=True)]


def described(seed: int) -> str:
    blocks, head = drawn.names(seed)
    return f"network {seed}: {', '.join(blocks)}; head: {head}"


@pytest.mark.parametrize(
    "first", [pytest.param(first, marks=[pytest.mark.soak] if first else []) for first in range(0, COUNT, TOGETHER)]
)
def test_drawn_networks_train_as_plain_torch_or_are_refused_or_announced(
    first: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    seeds = range(first, first + TOGETHER)

    def trained(ranks: int, *options: str) -> list[Outcome]:
        folder = tmp_path_factory.mktemp("run")
        found: list[Outcome] = run_ranks(train_drawn, ranks, seeds, str(folder), *options)[0]
        return found

    single = trained(1, "strategy=single")
    reference = run_ranks(plain_drawn, 1, seeds, ["refused" in outcome for outcome in single])[0]
    wrong = []
    kept = 0
    for seed, outcome, expected in zip(seeds, single, reference, strict=True):
        if "refused" in outcome:
            if "\n" in outcome["refused"]:
                wrong.append(f"single, {described(seed)}: {outcome['refused']}")
        elif outcome["announced"] or _differs(outcome, expected):
            wrong.append(f"single, {described(seed)}: {outcome['announced'] or _differs(outcome, expected)}")
        kept += "refused" not in outcome
    # Most networks can be trained.
    assert kept > TOGETHER / 2
    for name, options, unequal in [
        ("ddp", ("strategy=ddp",), drawn.UNEQUAL_ON_RANKS),
        # A block for every few weights.
        ("fsdp", ("strategy=fsdp", "strategy.block_mb=0.0005"), drawn.UNEQUAL_ON_RANKS),
        ("pipeline", ("strategy=pipeline", "strategy.microbatches=2"), drawn.UNEQUAL_IN_PASSES),
        ("tensor_parallel", ("strategy=tensor_parallel",), set()),
    ]:
        equal = 0
        for seed, outcome, expected in zip(seeds, trained(2, *options), single, strict=True):
            blocks, head = drawn.names(seed)
            if "refused" in outcome:
                if "\n" in outcome["refused"]:
                    wrong.append(f"{name}, {described(seed)}: {outcome['refused']}")
            elif "refused" in expected:
                wrong.append(f"{name}, {described(seed)}: trains, but single is refused: {expected['refused']}")
            elif bool(outcome["announced"]) != bool(unequal.intersection([*blocks, head])):
                wrong.append(f"{name}, {described(seed)}: announces {outcome['announced'] or 'nothing'}")
            elif not outcome["announced"]:
                equal += 1
                if problem := _differs(outcome, expected):
                    wrong.append(f"{name}, {described(seed)}: {problem}")
        assert equal > TOGETHER / 4
    assert not wrong, "\n".join(wrong)


def _differs(outcome: Outcome, expected: Outcome) -> str:
    """How two trained networks differ; empty if they are equal but for rounding."""
    own, other = (
        outcome["model"],
        {name: value for name, value in expected["model"].items() if name in outcome["model"]},
    )
    if own.keys() != other.keys():
        return f"other names: {sorted(own.keys() ^ other.keys())}"
    for name, tensor in own.items():
        if not tensor.is_floating_point() and not torch.equal(tensor, other[name]):
            return f"{name} is {tensor.tolist()} instead of {other[name].tolist()}"
    difference = relative_difference(own, other)
    return "" if difference <= BOUND else f"relative difference {difference:.1e}"
