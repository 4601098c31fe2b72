"""Models that are no sequence train in stages as in one process, under their own names, or are refused in one line."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from distrain.errors import ConfigError
from distrain.runtime.world import World
from distrain.strategies.pipeline import split
from distrain.strategies.pipeline.blocks import named_blocks, trace_blocks
from distrain.strategies.pipeline.options import PipelineConfig
from distrain.strategies.pipeline.traced_model import recorded_passes
from distrain.strategies.precision import Precision
from tests.runs import check, small
from tests.strategies.pipeline import traced_models
from tests.strategies.pipeline.stages import SCHEDULES, compare, model_options

CPU = torch.device("cpu")
#: Kinds of which several tensors cross each cut, or that have state in unusual places.
WIDE = ("densenet", "vit", "unet", "shared", "wrapped")


def test_every_kind_of_model_equals_one_process_on_two_ranks(tmp_path: Path) -> None:
    compare(tmp_path, traced_models.__name__, list(traced_models.MODELS), 2, ["1f1b"])


@pytest.mark.soak
def test_several_tensors_cross_cuts_with_every_schedule_and_on_three_ranks(tmp_path: Path) -> None:
    compare(tmp_path, traced_models.__name__, WIDE, 2, list(SCHEDULES)[1:])
    compare(tmp_path, traced_models.__name__, WIDE, 3, list(SCHEDULES)[:2])


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
        sequence = split.as_sequence(model, images, precision, options, auxiliary=False)
        split.possible_cuts(sequence, trace_blocks(sequence, images, precision), options)
    except ConfigError as error:
        return str(error)
    finally:
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return ""


@pytest.mark.parametrize("still", [frozenset({"body"}), frozenset()], ids=["still", "trained"])
def test_no_stage_begins_in_a_frozen_module_that_looks_at_its_mode(still: frozenset[str]) -> None:
    model, images, precision = traced_models.LooksAtMode(3, 4), torch.randn(2, 3, 8, 8), Precision("fp32", CPU)
    sequence = split.as_sequence(model, images, precision, options_of_pipeline(), still, auxiliary=False)
    assert ("body.second" in [name for name, _ in named_blocks(sequence)]) == (not still)
    sequence.train()
    trained = model(images)
    model.body.training = not still
    assert torch.equal(model(images), trained) == (not still)
    assert torch.equal(sequence(images), model(images))


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
        ("attribute", "its forward changes its own steps", "def forward(self, x: Tensor) -> Any:  # of Refused"),
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


class Counting(nn.Module):
    """Replaces a buffer; what it computes next gets the place of the old one in memory."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        calls = self.calls + 1
        self.calls = calls
        return x.relu()


def test_a_tensor_is_not_taken_for_a_buffer_that_was_replaced() -> None:
    model = nn.Sequential(*(Counting() for _ in range(8)))
    for trace in recorded_passes(model, torch.zeros(2, 3), Precision("fp32", torch.device("cpu")), auxiliary=False):
        assert [call.results for call in trace.root.calls or ()] == [[number] for number in range(1, 9)]


def test_a_model_that_cant_be_traced_is_refused_before_ranks_meet() -> None:
    config = small(*model_options(traced_models.__name__, "values"), "strategy=pipeline")
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
        ("resnet", 2, ["layer1.0.act#2"], ""),
        ("resnet", 2, ["layer1.0.act#3"], "is no block that a stage could begin with"),
        ("shared", 2, ["tied2"], "no stage can begin there: tied1 and tied2 use the same parameter"),
        ("resnet", 3, ["fc", "layer2"], "must be in the model's order"),
        ("resnet", 2, ["layer2", "fc"], "2 stages have 1 boundaries, not 2"),
        ("mode", 4, [], "can be cut at 2 places only; not before mul: mul is not called in evaluation"),
        ("mean", 2, ["second"], ""),
        ("heads", 2, ["third"], ""),
    ],
)
def test_boundaries_name_submodules_of_a_traced_model(kind: str, stages: int, boundaries: list[str], said: str) -> None:
    found = refusal(kind, stages, boundaries)
    assert said in found
    assert bool(said) == bool(found), found
