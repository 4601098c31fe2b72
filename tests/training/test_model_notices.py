"""What can't be equal to one process is said before training, and only then."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from distrain.models.trial import ModelTrial
from distrain.strategies import base as strategies
from distrain.training.model_notices import model_notices
from tests.models import cases
from tests.runs import small

#: Overrides, number of ranks, and how a line says it.
DIVISIONS: dict[str, tuple[tuple[str, ...], int, str]] = {
    "whole": ((), 1, ""),
    "whole on ddp": (("strategy=ddp",), 1, ""),
    "accumulating": (("trainer.micro_batch_size=3",), 1, "a batch is run in 4 forward passes"),
    "large pieces": (("trainer.micro_batch_size=10",), 1, ""),
    "ddp": (("strategy=ddp",), 2, "2 ranks share a batch"),
    "ddp, local": (("strategy=ddp", "strategy.batchnorm=local"), 2, "2 ranks share a batch"),
    "both": (("strategy=ddp", "trainer.micro_batch_size=2"), 2, "2 ranks share a batch, each in 3 forward passes"),
    "local SGD": (("strategy=local_sgd",), 3, "3 ranks share a batch"),
    "servers": (("strategy=parameter_server",), 3, "2 ranks share a batch"),
    "pipeline": (("strategy=pipeline", "strategy.stages=2"), 2, "a batch is run in 4 forward passes"),
}
#: How a line says what a model does.
SAID = {
    "dropout": "the model draws random numbers",
    "functional dropout": "the model draws random numbers",
    "noise": "the model draws random numbers",
    "own batch statistics": "the model mixes the samples",
    "a mean replaced": "forward changes mean according to the samples",
    "a mean changed": "forward changes mean according to the samples",
    "spectral norm": "each forward pass changes head.parametrizations.weight.0._u",
    "a counter": "each forward pass changes mean",
    "batch norm": "BatchNorm takes statistics of the samples",
    "sound": "",
    "layer norm": "",
    "changes its input": "",
}


@pytest.fixture(scope="module")
def trials() -> dict[str, ModelTrial]:
    images = {"in_channels": 3, "num_classes": 4, "image_size": (8, 8)}
    return {case: ModelTrial(cases.config(case), **images) for case in SAID}  # type: ignore[arg-type]


@pytest.mark.parametrize("division", DIVISIONS)
def test_what_can_not_be_equal_is_said(division: str, trials: dict[str, ModelTrial]) -> None:
    overrides, ranks, divided = DIVISIONS[division]
    composed = small(*overrides)
    strategy = strategies.strategy_class(composed)
    for case, said in SAID.items():
        config = dataclasses.replace(composed, model=cases.config(case))
        notices = model_notices(config, ranks, strategy, torch.float32, trials[case])
        one_pass_each = "forward passes" not in divided
        together = case == "batch norm" and division == "ddp"
        if not said or not divided or together or (one_pass_each and case in ("spectral norm", "a counter")):
            assert notices == []
            continue
        line = next(notice for notice in notices if notice.startswith(said))
        assert f"and {divided}" in line
        assert "differ from those of one process" in line
        if case == "batch norm":
            assert line.endswith("GroupNorm in the model is equal")


def test_unused_parameters_and_changed_number_formats_are_named() -> None:
    config = small()
    images = {"in_channels": 3, "num_classes": 4, "image_size": (8, 8)}
    for case, line in {
        "unused": "the loss doesn't depend on parameters more.weight, more.bias; they get no gradient",
        "double": "head.weight: float64 in the model, float32 in training, as trainer.precision=fp32 says",
    }.items():
        tried = ModelTrial(cases.config(case), **images)  # type: ignore[arg-type]
        assert model_notices(config, 1, strategies.strategy_class(config), torch.float32, tried) == [line]
