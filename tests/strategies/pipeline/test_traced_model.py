"""Models that are no sequence train in stages as in one process, under their own names, or are refused in one line."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from distrain.config.schema import Config
from distrain.errors import ConfigError
from distrain.optim.optimizers.build import build_optimizer
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.strategies.pipeline import split
from distrain.strategies.pipeline.blocks import trace_blocks
from distrain.strategies.pipeline.options import PipelineConfig
from distrain.strategies.pipeline.strategy import Pipeline
from distrain.strategies.precision import Precision
from distrain.training.assembly import build_loader, build_model
from distrain.training.run_plan import RunPlan
from tests.harness import run_ranks
from tests.runs import check, relative_difference, small
from tests.strategies.helpers import once
from tests.strategies.pipeline import traced_models

#: Batches of 10 of 47 images, and a last one of 7; 10 steps.
OPTIONS = (
    "model=custom",
    f"model._target_={traced_models.__name__}.build",
    "+model.kwargs.kind=''",
    "trainer.precision=fp64",
    "optimizer=sgd",
    "optimizer.lr=0.05",
    "optimizer.momentum=0.9",
    "optimizer.weight_decay=0.01",
)
STEPS = 10
CPU = torch.device("cpu")
BOUND = 1e-11
#: Schedules with the stages per rank.
SCHEDULES = {"1f1b": 1, "interleaved_zero_bubble": 2, "zbv_zero_bubble": 2, "gpipe": 1, "interleaved_1f1b": 2}


def pipeline(ranks: int, schedule: str) -> tuple[str, ...]:
    return ("strategy=pipeline", f"strategy.schedule={schedule}", f"strategy.stages={ranks * SCHEDULES[schedule]}")


def train_all(folder: str, kinds: Sequence[str], options: Sequence[tuple[str, ...]]) -> dict[Any, Any]:
    """What a rank does: trains and evaluates each model with each of the options, all in one process group."""
    found = {}
    first = small(*OPTIONS, *options[0], f"run_dir={folder}")
    world = World.from_environment()
    with Runtime(first, world, keep_logs=False) as runtime:
        # Each strategy would make groups of its own.
        runtime.mesh = once(runtime.mesh)  # type: ignore[method-assign]
        runtime.duplicate_group = once(runtime.duplicate_group)  # type: ignore[method-assign]
        for more in options:
            config = small(*OPTIONS, *more, f"run_dir={folder}")
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
    batches = [batch for epoch in range(2) for batch in loader.epoch(epoch)][:STEPS]
    for batch in batches:
        strategy.train_step(batch)
    outputs = [strategy.eval_step(batch).outputs for batch in testing.epoch(0)]
    trained = {name: tensor.detach().clone() for name, tensor in strategy.model_state().items()}
    assert list(trained) == names
    whole = torch.cat([each for each in outputs if each is not None]) if outputs[0] is not None else None
    rows = strategy._split.rows if isinstance(strategy, Pipeline) else []
    return {"model": trained, "outputs": whole, "rows": rows}


def compare(folder: Path, kinds: Sequence[str], ranks: int, schedules: Sequence[str]) -> list[dict[str, Any]]:
    """Compares runs in stages with runs of one process; returns what the first rank found."""
    options = [pipeline(ranks, schedule) for schedule in schedules]
    expected = run_ranks(train_all, 1, str(folder / "one"), kinds, [()])[0]
    found = run_ranks(train_all, ranks, str(folder / f"{ranks}"), kinds, options)
    for kind in kinds:
        single = expected[kind, ()]
        for option in options:
            results = [of_rank[kind, option] for of_rank in found]
            difference = relative_difference(results[0]["model"], single["model"])
            assert difference <= BOUND, f"{kind}, {option}: {difference:.1e}"
            (outputs,) = [result["outputs"] for result in results if result["outputs"] is not None]
            torch.testing.assert_close(outputs, single["outputs"], rtol=1e-9, atol=1e-9)
    return [found[0][kind, options[0]] for kind in kinds]


#: Kinds of which several tensors cross each cut, or that have state in unusual places.
WIDE = ("densenet", "vit", "unet", "shared", "wrapped")


def test_every_kind_of_model_equals_one_process_on_two_ranks(tmp_path: Path) -> None:
    found = compare(tmp_path, list(traced_models.MODELS), 2, ["1f1b"])
    assert all(result["rows"][0]["sends_tensors"] >= 1 for result in found)
    assert all(result["rows"][1]["sends_tensors"] == 0 for result in found)


@pytest.mark.soak
def test_several_tensors_cross_cuts_with_every_schedule_and_on_three_ranks(tmp_path: Path) -> None:
    compare(tmp_path, WIDE, 2, list(SCHEDULES)[1:])
    compare(tmp_path, WIDE, 3, list(SCHEDULES)[:2])


@functools.cache
def options_of_pipeline() -> PipelineConfig:
    options = small("strategy=pipeline").strategy
    assert isinstance(options, PipelineConfig)
    return options


def refusal(kind: str, stages: int = 2, boundaries: Sequence[str] = ()) -> str:
    """Why a model can't be split; empty if it can."""
    model, images, precision = traced_models.build(3, 4, kind), torch.randn(2, 3, 8, 8), Precision("fp32", CPU)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = dataclasses.replace(options_of_pipeline(), stages=stages, boundaries=list(boundaries))
    try:
        split.check(model, stages, boundaries)
        sequence = split.as_sequence(model, images, precision, options)
        split.possible_cuts(sequence, trace_blocks(sequence, images, precision), options)
    except ConfigError as error:
        return str(error)
    finally:
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return ""


def line_of(code: str) -> str:
    """Where a line of the models' file is."""
    path = Path(traced_models.__file__)
    return f"{path}:{next(n for n, line in enumerate(path.read_text().splitlines(), 1) if code in line)}"


@pytest.mark.parametrize(
    ("kind", "problem", "code"),
    [
        ("values", "a decision depends on a tensor's values", 'self.kind == "values"'),
        ("item", "item() reads a tensor's values", "x.mean().item()"),
        ("function", "Doubled is an autograd.Function", "x = Doubled.apply(x)"),
        ("attribute", "its forward changes its own steps", "def forward(self, x: Tensor) -> Tensor:  # of Refused"),
        ("draws", "its forward draws numbers by Python's or numpy's generator", "of Refused"),
        ("samples", "it depends on the number of samples: second with 2 and mul with 3", "x = x * 2"),
        ("root", "it depends on the number of samples: 1.41421", "len(x) ** 0.5"),
        ("autocast", "it changes autocast", "x = (x @ x).float()"),
    ],
)
def test_what_cant_be_traced_is_refused_with_the_line_of_the_users_code(kind: str, problem: str, code: str) -> None:
    said = refusal(kind)
    assert said.startswith("model: Refused is no nn.Sequential and can't be traced: ")
    assert problem in said
    assert line_of(code) in said or kind == "samples"
    assert "\n" not in said


def test_a_model_that_cant_be_traced_is_refused_before_ranks_meet() -> None:
    config = small(*OPTIONS, "model.kwargs.kind=values", "strategy=pipeline")
    with pytest.raises(ConfigError, match=r"Refused is no nn.Sequential and can't be traced: a decision depends on a"):
        check(config, World(0, 2, 0, 2, "here"))


@pytest.mark.parametrize(
    ("kind", "stages", "boundaries", "said"),
    [
        ("plain", 2, ["third.head"], ""),
        ("plain", 2, ["third"], ""),
        ("resnet", 2, ["layer1.1.norm2"], ""),
        (
            "plain",
            2,
            ["third.decides.inner"],
            "third.decides.inner: lies inside third.decides, which is run as a whole",
        ),
        ("plain", 2, ["nothing"], "strategy.boundaries=nothing: is no block that a stage could begin with; choices: "),
        ("plain", 2, ["first"], "strategy.boundaries=first: is what the model begins with"),
        ("shared", 2, ["shared.1"], "strategy.boundaries=shared.1: no stage can begin there: shared"),
        ("shared", 2, ["tied2"], "no stage can begin there: tied1 and tied2 use the same parameter"),
        ("resnet", 3, ["fc", "layer2"], "must be in the model's order"),
        ("resnet", 2, ["layer2", "fc"], "2 stages have 1 boundaries, not 2"),
        ("mode", 4, [], "can be cut at 2 places only; not before mul: mul is not called in evaluation"),
        ("mean", 2, ["second"], ""),
    ],
)
def test_boundaries_name_submodules_of_a_traced_model(kind: str, stages: int, boundaries: list[str], said: str) -> None:
    found = refusal(kind, stages, boundaries)
    assert said in found
    assert bool(said) == bool(found), found
