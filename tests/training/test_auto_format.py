"""Number format and layout where they are ``auto``: fastest by trial, alike on all ranks, repeated by who goes on."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from distrain.cli import app
from distrain.config.schema import Config
from distrain.data.base import Splits
from distrain.errors import ConfigError
from distrain.models.base import BlockSequence
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.training import auto_format
from distrain.training.assembly import build_model
from distrain.training.auto_format import Formats, fastest
from distrain.training.run_plan import RunPlan, data_source
from tests.harness import run_ranks
from tests.runs import compose, small

A, B = Formats("fp32", "contiguous"), Formats("fp32", "channels_last")
C, D = Formats("bf16", "contiguous"), Formats("bf16", "channels_last")
LAYOUT = "trainer.memory_format=auto"
BOTH = (LAYOUT, "trainer.precision=auto", "trainer.lowest_precision=bf16")
#: A clock by which a step takes so many seconds, whatever it computes.
Clock = dict[Formats, float]


def use_clock(clock: Clock, monkeypatch: pytest.MonkeyPatch | None = None) -> list[float]:
    """Replaces the clock by one that is read off a table, a step of four images; returns what is added to."""
    spent: list[float] = []

    def timed(model: nn.Module, inputs: Tensor, targets: Tensor, task: object, precision: Any) -> float:
        last = inputs.is_contiguous(memory_format=torch.channels_last)
        spent.append(clock[Formats(precision.name, "channels_last" if last else "contiguous")] * len(targets) / 4)
        return spent[-1]

    if monkeypatch is None:
        auto_format._timed = timed
    else:
        monkeypatch.setattr(auto_format, "_timed", timed)
    return spent


def refuse(*_: object) -> NoReturn:
    raise AssertionError("something is tried")


def _settled(config: Config, runtime: Runtime, splits: Splits) -> Config:
    plan = RunPlan.resolve(config, runtime.world)
    return auto_format.resolve_auto(config, runtime, splits, plan.task, partial(build_model, plan, splits))


def settled(config: Config) -> Formats:
    with Runtime(config, World.from_environment()) as runtime:
        found = _settled(config, runtime, data_source(config).load())
    return Formats(found.trainer.precision, found.trainer.memory_format)


@pytest.fixture
def option(tmp_path: Path) -> str:
    return f"run_dir={tmp_path / 'run'}"


# --- the choice ------------------------------------------------------------------------------------------------------

CHOICES: dict[str, tuple[Clock, dict[str, str], Formats | None]] = {
    "the fastest": ({A: 2.0, B: 1.0}, {"fp32": "contiguous"}, B),
    "the rule's, by a little slower": ({A: 1.03, B: 1.0}, {"fp32": "contiguous"}, A),
    "against the rule, if clearly faster": ({A: 1.06, B: 1.0}, {"fp32": "contiguous"}, B),
    "the higher precision, by a little slower": (
        {A: 2.0, B: 1.03, C: 2.0, D: 1.0},
        {"fp32": "channels_last", "bf16": "channels_last"},
        B,
    ),
    "the lower precision, if clearly faster": (
        {A: 2.0, B: 1.5, C: 0.99, D: 1.0},
        {"fp32": "channels_last", "bf16": "channels_last"},
        D,
    ),
    "not what fails": ({A: 2.0, B: math.inf}, {"fp32": "channels_last"}, A),
    "nothing where all fail": ({A: math.inf, B: math.inf}, {"fp32": "channels_last"}, None),
    "a lower precision where the higher fails": (
        {A: math.inf, C: 1.0},
        {"fp32": "contiguous", "bf16": "contiguous"},
        C,
    ),
}


@pytest.mark.parametrize("case", CHOICES)
def test_a_trial_chooses(case: str) -> None:
    seconds, usual, expected = CHOICES[case]
    assert fastest(seconds, usual) == expected


def test_a_precision_is_never_lower_than_allowed(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_clock({A: 4.0, B: 3.0, C: 1.0, D: 2.0}, monkeypatch)
    assert settled(small(LAYOUT, "trainer.precision=auto", option)) == B
    assert settled(small(LAYOUT, "trainer.precision=auto", "trainer.lowest_precision=bf16", option)) == C


def test_what_the_user_fixed_stays(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_clock({A: 4.0, B: 3.0, C: 1.0, D: 2.0}, monkeypatch)
    assert settled(small(*BOTH, "trainer.memory_format=channels_last", option)) == D
    assert settled(small(*BOTH, "trainer.precision=fp32", option)) == B
    assert settled(small(LAYOUT, "trainer.precision=bf16", option)) == C


def test_a_precision_that_has_no_trial_is_no_limit() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.lowest_precision=fp16: unknown choice; choices: fp32, bf16"):
        compose("trainer.lowest_precision=fp16")


WITHOUT_TRIAL = {
    "explicit": (("trainer.memory_format=contiguous",), A),
    "deterministic": ((*BOTH, "trainer.deterministic=true"), Formats("fp32", "auto")),
    "compiled": ((*BOTH, "trainer.compile=true"), Formats("fp32", "auto")),
}


@pytest.mark.parametrize("case", WITHOUT_TRIAL)
def test_nothing_is_tried_where_that_says_nothing(case: str, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "build_model", refuse)
    options, expected = WITHOUT_TRIAL[case]
    assert settled(small(*options, option)) == expected


def test_images_without_a_convolution_stay_as_they_are(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spent = use_clock({A: 2.0, B: 1.0}, monkeypatch)
    assert settled(small("model=custom", f"model._target_={__name__}.Flat", LAYOUT, option)) == A
    assert not spent


# --- the trial -------------------------------------------------------------------------------------------------------


class Flat(nn.Linear):
    """A linear classifier of 3x8x8 images."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(192, num_classes)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(1))


class Planar(BlockSequence):
    """A CNN that runs contiguous images only, as many do."""

    def __init__(self, num_classes: int) -> None:
        super().__init__({"features": nn.Conv2d(3, 2, 3), "head": nn.Linear(72, num_classes)})

    def forward(self, input: Tensor) -> Tensor:
        features = self[0](input)
        return self[1](features.view(len(features), 72))  # type: ignore[no-any-return]


def test_a_trial_changes_nothing_but_the_two_keys(option: str) -> None:
    config = small(*BOTH, option)
    draws = []
    for tried in (False, True):
        with Runtime(config, World.from_environment()) as runtime:
            splits = data_source(config).load()
            after = _settled(config, runtime, splits) if tried else config
            draws.append((float(torch.rand(())), random.random(), float(np.random.rand())))  # noqa: NPY002
    assert draws[0] == draws[1]
    chosen = Formats(after.trainer.precision, after.trainer.memory_format)
    assert chosen in (A, B, C, D)
    after.trainer.precision, after.trainer.memory_format = config.trainer.precision, config.trainer.memory_format
    assert after == config


def test_a_format_in_which_the_model_fails_is_not_chosen(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert settled(small("model=custom", f"model._target_={__name__}.Planar", LAYOUT, option)) == A
    said = capsys.readouterr().err
    assert "fp32       channels_last     fails" in said
    assert "fp32, channels_last: view size is not compatible" in said


def test_the_table_is_logged(option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    use_clock({A: 0.004, B: 0.003, C: 0.005, D: 0.001}, monkeypatch)
    settled(small(*BOTH, option))
    assert (
        "tried forward and backward passes of 10 images:\n"
        "precision  memory format        ms\n"
        "fp32       contiguous        10.00\n"
        "fp32       channels_last      7.50\n"
        "bf16       contiguous        12.50\n"
        "bf16       channels_last      2.50  chosen\n"
    ) in capsys.readouterr().err


@pytest.mark.parametrize("seconds", [0.0001, 0.1, 3.0])
def test_a_trial_is_short_whatever_the_model(seconds: float, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spent = use_clock({A: seconds, B: seconds}, monkeypatch)
    settled(small(LAYOUT, "data.batch_size=48", option))
    assert sum(spent) < max(4.0, 9 * seconds)
    assert len(spent) <= 14


def test_a_share_that_runs_in_pieces_is_tried_in_a_piece(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_clock({A: 0.1, B: 0.1}, monkeypatch)
    settled(small(LAYOUT, "trainer.micro_batch_size=5", option))
    assert "tried forward and backward passes of 5 images" in capsys.readouterr().err


# --- ranks -----------------------------------------------------------------------------------------------------------


def opposed(config: Config) -> Formats:
    """Ranks whose clocks speak for different formats, the second one's louder."""
    clocks: list[Clock] = [{A: 2.0, B: 1.0}, {A: 4.0, B: 9.0}]
    use_clock(clocks[World.from_environment().rank])
    return settled(config)


def test_all_ranks_choose_what_is_fastest_on_the_slowest(option: str) -> None:
    assert run_ranks(opposed, 2, small("strategy=ddp", LAYOUT, option)) == [A, A]


def counted(config: Config) -> tuple[Formats, bool]:
    """What is chosen, and whether this rank tried anything."""
    spent = use_clock({A: 1.0, B: 2.0})
    return settled(config), bool(spent)


def test_a_parameter_server_takes_what_its_workers_found(option: str) -> None:
    config = small("strategy=parameter_server", LAYOUT, option)
    assert run_ranks(counted, 2, config) == [(A, True), (A, False)]


def test_stages_of_a_pipeline_go_by_the_rule(option: str) -> None:
    config = small("strategy=pipeline", "strategy.stages=2", LAYOUT, "trainer.precision=auto", option)
    assert run_ranks(counted, 2, config) == [(Formats("fp32", "auto"), False)] * 2


def of_unlike_devices(config: Config) -> Formats:
    auto_format.default_precision = lambda device: "fp32" if World.from_environment().rank else "bf16"
    return settled(config)


def test_a_precision_by_the_rule_is_one_that_all_ranks_have(option: str) -> None:
    asked = small(*BOTH, option, "strategy=ddp", "trainer.deterministic=true")
    assert [found.precision for found in run_ranks(of_unlike_devices, 2, asked)] == ["fp32", "fp32"]


# --- going on --------------------------------------------------------------------------------------------------------


def of_run(folder: Path) -> Formats:
    trainer = yaml.safe_load((folder / "config.yaml").read_text())["trainer"]
    return Formats(trainer["precision"], trainer["memory_format"])


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Formats]:
    """Trains to a step in a folder, by a clock, and returns what its ``config.yaml`` says."""

    def train(clock: Clock, steps: int, *options: str) -> Formats:
        use_clock(clock, monkeypatch)
        app.train(small(*BOTH, f"trainer.max_steps={steps}", f"run_dir={tmp_path / 'run'}", *options))
        return of_run(tmp_path / "run")

    return train


FASTEST: list[Clock] = [
    {A: 1.0, B: 9.0, C: 9.0, D: 9.0},
    {A: 9.0, B: 9.0, C: 9.0, D: 1.0},
]


def test_a_run_that_goes_on_chooses_as_it_began(begun: Callable[..., Formats]) -> None:
    assert begun(FASTEST[1], 2) == D
    assert begun(FASTEST[0], 4) == D


def test_a_layout_by_the_rule_stays_one(begun: Callable[..., Formats]) -> None:
    # An earlier release never tried; a trial now could end in another layout than the checkpoint was computed in.
    assert begun(FASTEST[1], 2, "trainer.precision=fp32", "trainer.deterministic=true").memory_format == "auto"
    assert begun(FASTEST[0], 4, "trainer.precision=fp32").memory_format == "auto"


def test_a_run_that_begins_anew_chooses_anew(begun: Callable[..., Formats]) -> None:
    assert begun(FASTEST[1], 2) == D
    assert begun(FASTEST[0], 2, "resume=never") == A


def test_a_run_from_anothers_checkpoint_chooses_as_that_did(
    begun: Callable[..., Formats], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert begun(FASTEST[1], 2) == D
    path = tmp_path / "run" / "checkpoints" / "step_00000002"
    begun(FASTEST[0], 4, f"resume={path}", f"run_dir={tmp_path / 'other'}")
    assert of_run(tmp_path / "other") == D


def test_a_precision_that_is_no_longer_allowed_is_chosen_anew(begun: Callable[..., Formats]) -> None:
    assert begun(FASTEST[1], 2) == D
    assert begun(FASTEST[0], 4, "trainer.lowest_precision=fp32") == A
