"""``auto`` formats: the fastest by trial, the same on all ranks, and the same again in a resumed run."""

from __future__ import annotations

import math
import random
import time
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
from distrain.data.base import Splits, data_source
from distrain.errors import ConfigError
from distrain.models.base import BlockSequence
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.training import auto_format
from distrain.training.assembly import build_model
from distrain.training.auto_format import Formats, fastest
from distrain.training.run_plan import RunPlan
from tests.harness import run_ranks
from tests.runs import compose, small

A, B = Formats("fp32", "contiguous"), Formats("fp32", "channels_last")
C, D = Formats("bf16", "contiguous"), Formats("bf16", "channels_last")
LAYOUT = "trainer.memory_format=auto"
BOTH = (LAYOUT, "trainer.precision=auto", "trainer.lowest_precision=bf16")
#: Seconds of a step in each format, whatever it computes.
Clock = dict[Formats, float]


def use_clock(clock: Clock, monkeypatch: pytest.MonkeyPatch | None = None) -> list[float]:
    """Replaces timing by a table for steps of four images; returns a list that each step's time is appended to."""
    spent: list[float] = []

    def time_step(model: nn.Module, inputs: Tensor, targets: Any, task: object, precision: Any, weight: float) -> float:
        last = inputs.is_contiguous(memory_format=torch.channels_last)
        spent.append(clock[Formats(precision.name, "channels_last" if last else "contiguous")] * len(targets) / 4)
        return spent[-1]

    if monkeypatch is None:
        auto_format._time_step = time_step
    else:
        monkeypatch.setattr(auto_format, "_time_step", time_step)
    return spent


def refuse(*_: object) -> NoReturn:
    raise AssertionError("a trial was made")


def _resolve_config(config: Config, runtime: Runtime, splits: Splits) -> Config:
    plan = RunPlan.resolve(config, runtime.world)
    return auto_format.resolve_auto(config, runtime, splits, plan.task, partial(build_model, plan, splits))


def resolve(config: Config) -> Formats:
    with Runtime(config, World.from_environment()) as runtime:
        found = _resolve_config(config, runtime, data_source(config.data).load())
    return Formats(found.trainer.precision, found.trainer.memory_format)


@pytest.fixture
def run_dir(tmp_path: Path) -> str:
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
def test_the_fastest_formats_are_chosen_in_doubt_the_default(case: str) -> None:
    seconds, default_layouts, expected = CHOICES[case]
    assert fastest(seconds, default_layouts) == expected


def test_a_precision_is_never_lower_than_allowed(run_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_clock({A: 4.0, B: 3.0, C: 1.0, D: 2.0}, monkeypatch)
    assert resolve(small(LAYOUT, "trainer.precision=auto", run_dir)) == B
    assert resolve(small(LAYOUT, "trainer.precision=auto", "trainer.lowest_precision=bf16", run_dir)) == C


def test_a_configured_format_is_kept(run_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_clock({A: 4.0, B: 3.0, C: 1.0, D: 2.0}, monkeypatch)
    assert resolve(small(*BOTH, "trainer.memory_format=channels_last", run_dir)) == D
    assert resolve(small(*BOTH, "trainer.precision=fp32", run_dir)) == B
    assert resolve(small(LAYOUT, "trainer.precision=bf16", run_dir)) == C


def test_a_lowest_precision_without_a_trial_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.lowest_precision=fp16: unknown choice; choices: fp32, bf16"):
        compose("trainer.lowest_precision=fp16")


WITHOUT_TRIAL = {
    "explicit": (("trainer.memory_format=contiguous",), A),
    "deterministic": ((*BOTH, "trainer.deterministic=true"), Formats("fp32", "auto")),
    "compiled": ((*BOTH, "trainer.compile=true"), Formats("fp32", "auto")),
}


@pytest.mark.parametrize("case", WITHOUT_TRIAL)
def test_no_trial_where_the_formats_are_fixed_or_timing_is_unwanted(
    case: str, run_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "build_model", refuse)
    options, expected = WITHOUT_TRIAL[case]
    assert resolve(small(*options, run_dir)) == expected


def test_a_model_without_convolutions_stays_contiguous(run_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spent = use_clock({A: 2.0, B: 1.0}, monkeypatch)
    assert resolve(small("model=custom", f"model._target_={__name__}.Flat", LAYOUT, run_dir)) == A
    assert not spent


# --- the trial -------------------------------------------------------------------------------------------------------


class Flat(nn.Linear):
    """A linear classifier of 3x8x8 images."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(192, num_classes)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(1))


class ContiguousOnly(BlockSequence):
    """A CNN that accepts contiguous images only."""

    def __init__(self, num_classes: int) -> None:
        super().__init__({"features": nn.Conv2d(3, 2, 3), "head": nn.Linear(72, num_classes)})

    def forward(self, input: Tensor) -> Tensor:
        features = self[0](input)
        return self[1](features.view(len(features), 72))  # type: ignore[no-any-return]


def test_a_trial_changes_only_the_two_keys(run_dir: str) -> None:
    config = small(*BOTH, run_dir)
    draws = []
    for tried in (False, True):
        with Runtime(config, World.from_environment()) as runtime:
            splits = data_source(config.data).load()
            after = _resolve_config(config, runtime, splits) if tried else config
            draws.append((float(torch.rand(())), random.random(), float(np.random.rand())))  # noqa: NPY002
    assert draws[0] == draws[1]
    chosen = Formats(after.trainer.precision, after.trainer.memory_format)
    assert chosen in (A, B, C, D)
    after.trainer.precision, after.trainer.memory_format = config.trainer.precision, config.trainer.memory_format
    assert after == config


def logged(run_dir: str) -> str:
    return Path(run_dir.removeprefix("run_dir="), "logs", "rank_0.log").read_text()


def test_a_format_in_which_the_model_fails_is_not_chosen(run_dir: str) -> None:
    assert resolve(small("model=custom", f"model._target_={__name__}.ContiguousOnly", LAYOUT, run_dir)) == A
    output = logged(run_dir)
    assert "fp32       channels_last     fails" in output
    assert "fp32, channels_last: view size is not compatible" in output


def test_the_table_is_logged_and_not_shown(
    run_dir: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_clock({A: 0.004, B: 0.003, C: 0.005, D: 0.001}, monkeypatch)
    resolve(small(*BOTH, run_dir))
    assert (
        "tried forward and backward passes of 10 images:\n"
        "precision  memory format        ms\n"
        "fp32       contiguous        10.00\n"
        "fp32       channels_last      7.50\n"
        "bf16       contiguous        12.50\n"
        "bf16       channels_last      2.50  chosen\n"
    ) in logged(run_dir)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("seconds", "most"), [(0.0001, 16), (0.1, 16), (3.0, 4)])
def test_a_trial_is_short_for_any_model(
    seconds: float, most: int, run_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent = use_clock({A: seconds, B: seconds}, monkeypatch)
    resolve(small(LAYOUT, "data.batch_size=48", run_dir))
    assert sum(spent) < max(4.0, 4 * seconds)
    assert len(spent) <= most


def test_a_trial_has_the_size_of_a_microbatch(run_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_clock({A: 0.1, B: 0.1}, monkeypatch)
    resolve(small(LAYOUT, "trainer.micro_batch_size=5", run_dir))
    assert "tried forward and backward passes of 5 images" in logged(run_dir)


#: True times of a step, by how much a disturbed step is longer at most, the usual layout, and what must be chosen.
ON_A_BUSY_MACHINE: dict[str, tuple[Clock, float, str, set[Formats]]] = {
    "the usual one is six times faster": ({A: 0.01, B: 0.06}, 8, "contiguous", {A}),
    "the other one is six times faster": ({A: 0.06, B: 0.01}, 8, "contiguous", {B}),
    "the usual one, with long steps": ({A: 0.1, B: 0.6}, 4, "contiguous", {A}),
    "equally fast": ({A: 0.01, B: 0.01}, 8, "channels_last", {A, B}),
}


@pytest.mark.parametrize("case", ON_A_BUSY_MACHINE)
def test_other_work_on_the_machine_does_not_choose_a_far_slower_format(case: str) -> None:
    """Two hundred machines on which three steps of five take several times as long as they would alone."""
    clock, worst, usual, expected = ON_A_BUSY_MACHINE[case]
    chosen = []
    for seed in range(200):
        noise = random.Random(seed)

        def time_round(noise: random.Random = noise) -> list[float]:
            return [seconds * (noise.uniform(1, worst) if noise.random() < 0.6 else 1) for seconds in clock.values()]

        rounds = auto_format.repeat_rounds(time_round, list(clock), {"fp32": usual})
        shortest, typical = (
            dict(zip(clock, seconds, strict=True))
            for seconds in (auto_format._shortest(rounds), auto_format._typical(rounds))
        )
        chosen.append(auto_format.clearly_fastest(shortest, typical, {"fp32": usual}))
    assert set(chosen) <= expected
    # Two starts of the same run should choose the same.
    assert len(chosen) - max(map(chosen.count, expected)) <= 20


def test_time_on_a_processor_stands_still_while_others_have_it() -> None:
    before = auto_format._now(torch.device("cpu"))
    time.sleep(0.2)
    assert auto_format._now(torch.device("cpu")) - before < 0.1


# --- ranks -----------------------------------------------------------------------------------------------------------


def with_opposed_clocks(config: Config) -> Formats:
    """Resolves on two ranks for which different formats are faster, with a larger difference on the second one."""
    clocks: list[Clock] = [{A: 2.0, B: 1.0}, {A: 4.0, B: 9.0}]
    use_clock(clocks[World.from_environment().rank])
    return resolve(config)


def test_the_slowest_rank_decides(run_dir: str) -> None:
    assert run_ranks(with_opposed_clocks, 2, small("strategy=ddp", LAYOUT, run_dir)) == [A, A]


def with_trial_flag(config: Config) -> tuple[Formats, bool]:
    """The choice, and whether this rank took part in the trial."""
    spent = use_clock({A: 1.0, B: 2.0})
    return resolve(config), bool(spent)


def test_a_parameter_server_uses_the_choice_of_its_workers(run_dir: str) -> None:
    config = small("strategy=parameter_server", LAYOUT, run_dir)
    assert run_ranks(with_trial_flag, 2, config) == [(A, True), (A, False)]


def test_a_pipeline_uses_the_defaults(run_dir: str) -> None:
    config = small("strategy=pipeline", "strategy.stages=2", LAYOUT, "trainer.precision=auto", run_dir)
    assert run_ranks(with_trial_flag, 2, config) == [(Formats("fp32", "auto"), False)] * 2


def on_different_devices(config: Config) -> Formats:
    auto_format.default_precision = lambda device: "fp32" if World.from_environment().rank else "bf16"
    return resolve(config)


def test_the_default_precision_is_one_that_all_ranks_support(run_dir: str) -> None:
    asked = small(*BOTH, run_dir, "strategy=ddp", "trainer.deterministic=true")
    assert [found.precision for found in run_ranks(on_different_devices, 2, asked)] == ["fp32", "fp32"]


# --- resumed runs
# --------------------------------------------------------------------------------------------------------


def formats_of_run(folder: Path) -> Formats:
    trainer = yaml.safe_load((folder / "config.yaml").read_text())["trainer"]
    return Formats(trainer["precision"], trainer["memory_format"])


@pytest.fixture
def train_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Formats]:
    """Trains up to a step and returns the formats in the run's ``config.yaml``."""

    def train(clock: Clock, steps: int, *options: str) -> Formats:
        use_clock(clock, monkeypatch)
        app.train(small(*BOTH, f"trainer.max_steps={steps}", f"run_dir={tmp_path / 'run'}", *options))
        return formats_of_run(tmp_path / "run")

    return train


FASTEST: list[Clock] = [
    {A: 1.0, B: 9.0, C: 9.0, D: 9.0},
    {A: 9.0, B: 9.0, C: 9.0, D: 1.0},
]


def test_a_resumed_run_keeps_its_formats(train_to: Callable[..., Formats]) -> None:
    assert train_to(FASTEST[1], 2) == D
    assert train_to(FASTEST[0], 4) == D


def test_a_default_layout_stays_the_default(train_to: Callable[..., Formats]) -> None:
    # A trial now could choose another layout than that of the checkpoint.
    assert train_to(FASTEST[1], 2, "trainer.precision=fp32", "trainer.deterministic=true").memory_format == "auto"
    assert train_to(FASTEST[0], 4, "trainer.precision=fp32").memory_format == "auto"


def test_a_run_from_the_beginning_chooses_again(train_to: Callable[..., Formats]) -> None:
    assert train_to(FASTEST[1], 2) == D
    assert train_to(FASTEST[0], 2, "resume=never") == A


def test_a_run_from_another_runs_checkpoint_uses_its_formats(
    train_to: Callable[..., Formats], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train_to(FASTEST[1], 2) == D
    path = tmp_path / "run" / "checkpoints" / "step_00000002"
    train_to(FASTEST[0], 4, f"resume={path}", f"run_dir={tmp_path / 'other'}")
    assert formats_of_run(tmp_path / "other") == D


def test_a_precision_that_is_no_longer_allowed_is_chosen_again(train_to: Callable[..., Formats]) -> None:
    assert train_to(FASTEST[1], 2) == D
    assert train_to(FASTEST[0], 4, "trainer.lowest_precision=fp32") == A
