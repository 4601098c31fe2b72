"""What a model's first trial refuses in one line, and what it finds out of a model that can be trained."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
import torch

from distrain.config.groups import ModelConfig
from distrain.errors import ConfigError
from distrain.models import trial
from distrain.models.trial import ModelTrial
from tests.models import cases
from tests.runs import small

IMAGES: dict[str, Any] = {"in_channels": 3, "num_classes": 4, "image_size": (8, 8)}


@pytest.mark.parametrize("case", cases.REFUSED)
def test_a_model_that_can_not_be_trained_is_refused_in_one_line(case: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelTrial(cases.config(case), **IMAGES)
    assert cases.REFUSED[case][1] in str(caught.value)
    assert str(caught.value).startswith(("model._target_=tests.models.cases.make: ", "model: "))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", cases.FOUND)
def test_what_a_user_must_know_of_a_model_is_found_out(case: str) -> None:
    tried = ModelTrial(cases.config(case), **IMAGES)
    found = {
        "unused": tried.unused,
        "ignored_outputs": tried.ignored_outputs,
        "auxiliary_outputs": tried.auxiliary_outputs,
        "cast": dict(tried.cast),
        "buffers_of_samples": tried.buffers_of_samples,
        "buffers_of_passes": tried.buffers_of_passes,
        "draws_random": tried.draws_random,
        "mixes_samples": tried.mixes_samples,
    }
    assert {name: value for name, value in found.items() if value} == cases.FOUND[case][1]


def test_with_a_weight_the_loss_depends_on_an_auxiliary_head() -> None:
    config = dataclasses.replace(cases.config("an auxiliary head"), auxiliary_weight=0.3)
    tried = ModelTrial(config, **IMAGES)
    assert (tried.unused, tried.ignored_outputs, tried.auxiliary_outputs) == ([], ["images"], [])


@pytest.mark.parametrize("case", ["sound", "dropout", "Python's numbers", "numpy's numbers"])
def test_a_trial_leaves_all_random_numbers_as_they_were(case: str) -> None:
    def next_numbers() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))  # noqa: NPY002 - as users draw

    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002 - as users seed
    expected = next_numbers()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002 - as users seed
    ModelTrial(cases.config(case), **IMAGES).problem_with(1, training=True)
    assert next_numbers() == expected


@pytest.mark.parametrize("case", ["a mean changed", "a counter", "spectral norm"])
def test_of_a_large_model_changes_of_buffers_are_known_too(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_FAST_FLOPS", 0)
    tried = ModelTrial(cases.config(case), **IMAGES)
    assert tried.buffers_of_samples == [name for names in cases.FOUND[case][1].values() for name in names]


@pytest.mark.parametrize("case", ["all frozen", "no_grad", "nothing in evaluation", "a buffer added"])
def test_a_large_model_that_can_not_be_trained_is_refused_too(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_FAST_FLOPS", 0)
    with pytest.raises(ConfigError, match=cases.REFUSED[case][1].replace("[", r"\[")):
        ModelTrial(cases.config(case), **IMAGES)


@pytest.mark.parametrize(("fast", "device"), [(2.0e9, "meta"), (2.5e9, "cpu")])
def test_operations_of_our_own_model_are_counted(fast: float, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_FAST_FLOPS", fast)
    # Two images of 32 x 32 pixels take 2.2e9 operations; each parameter at each pixel would be 5e10.
    tried = ModelTrial(small("model=resnet18").model, **{**IMAGES, "image_size": (32, 32)})
    assert next(tried.model.parameters()).device.type == device


def test_a_model_of_usual_size_is_tried_without_the_compiler() -> None:
    lines = ["import sys", "from distrain.models.trial import ModelTrial", "from tests.runs import small"]
    lines += ["ModelTrial(small('model=resnet50').model, in_channels=3, num_classes=4, image_size=(96, 96))"]
    lines += ["print('torch._dynamo' in sys.modules)"]
    done = subprocess.run([sys.executable, "-c", "; ".join(lines)], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("case", "training", "batchnorm", "problem"),
    [
        ("sound", True, True, ""),
        ("batch norm", True, True, "fails on images [1, 3, 8, 8] (ValueError: Expected more than 1 value"),
        ("batch norm", True, False, ""),
        ("batch norm", False, True, ""),
        ("own batch statistics", True, True, "returns NaN for a single image"),
        ("own batch statistics", False, True, "returns NaN for a single image in evaluation mode"),
    ],
)
def test_a_single_image_can_be_tried(case: str, training: bool, batchnorm: bool, problem: str) -> None:
    found = ModelTrial(cases.config(case), **IMAGES).problem_with(1, training=training, batchnorm=batchnorm)
    assert found.startswith(problem)
    assert bool(found) == bool(problem)


def test_a_model_that_takes_long_is_named_while_it_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    said = False

    def waits(net: cases.Net, images: torch.Tensor) -> torch.Tensor:
        nonlocal said
        while not said:
            said = "still waiting for the first trial of tests.models.cases.make" in caplog.text
            time.sleep(0.001)
        return cases._sound(net, images)

    monkeypatch.setattr(trial, "_PATIENCE", 0.01)
    monkeypatch.setitem(cases.FOUND, "slow", (cases.changed(forward=waits), {}))
    ModelTrial(cases.config("slow"), **IMAGES)
    assert said


@pytest.mark.parametrize("model", ["simple_cnn", "cifar_cnn", "resnet18", "airbench_cnn"])
def test_models_of_our_own_are_known_and_tried_once(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config: ModelConfig = small(f"model={model}").model
    passes: list[bool] = []
    run = ModelTrial._forward

    def counted(self: ModelTrial, images: torch.Tensor) -> Any:
        passes.append(self.model.training)
        return run(self, images)

    monkeypatch.setattr(ModelTrial, "_forward", counted)
    tried = ModelTrial(config, in_channels=3, num_classes=10, image_size=(32, 32))
    assert passes == [True]
    assert not tried.mixes_samples
