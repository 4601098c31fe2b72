"""A program gives what its task makes of the model's outputs, for images as they are stored."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from distrain.errors import ConfigError
from distrain.tasks.base import Task
from distrain.tools.exporting import agreement, program_files
from distrain.tools.exporting.own_model import OwnModel
from distrain.tools.exporting.program import Program, random_images
from tests.harness import soaked
from tests.tasks.helpers import task_for

_CPU = torch.device("cpu")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
TASKS = {
    "class": ("task=classification", {"probabilities", "class"}),
    "labels": ("task=multilabel", {"probabilities", "labels"}),
    "numbers": ("task=regression", {"numbers"}),
    "mask": ("task=segmentation", {"probabilities", "class"}),
}


class Net(nn.Module):
    """Logits for each image or pixel, and with them an output that is of use in training alone."""

    def __init__(self, outputs: int, pixels: bool) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(), nn.ReLU())
        self.head = nn.Conv2d(8, outputs, 1)
        self.pixels = pixels

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(images)
        logits = self.head(features)
        return logits if self.pixels else logits.mean((2, 3)), features


def made(target: str, preprocess: str, *overrides: str) -> tuple[Program, OwnModel]:
    task = task_for(target, TASKS[target][0], *overrides)
    torch.manual_seed(0)
    model = Net(task.output_size, target == "mask").eval().requires_grad_(False)
    return Program(model, task, task.spec, MEAN, STD, preprocess).eval(), OwnModel(model, task, MEAN, STD)


def metrics(task: Task, outputs: Tensor) -> dict[str, float]:
    """Of outputs for five images, whose targets are what the last layer finds largest or positive in noise."""
    noise, state = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1)), task.metric_state(_CPU)
    targets = {"class": noise.argmax(1), "labels": (noise > 0).to(torch.uint8), "mask": noise.argmax(1)}
    task.update_state(state, outputs, targets.get(str(task.target), noise))
    return {name: round(value, 6) for name, value in task.results(state, len(outputs)).items()}


@pytest.mark.parametrize("target", TASKS)
@pytest.mark.parametrize("views", ["plain", "flip"])
def test_a_program_gives_the_results_of_its_task(target: str, views: str) -> None:
    inside, own = made(target, "inside", f"trainer.test_views={views}")
    images = random_images(own._task.spec, 5)
    assert images.dtype == inside.input_dtype == torch.uint8
    results, outputs = inside(images), own.outputs(images)
    assert results.keys() == TASKS[target][1] == set(inside.describe()["outputs"])
    if "probabilities" in results:
        expected = outputs.sigmoid() if target == "labels" else outputs.softmax(1)
        assert torch.allclose(results["probabilities"], expected, atol=1e-6)
    if "class" in results:
        assert results["class"].equal(outputs.argmax(1))
    assert metrics(own._task, own._task.outputs_of(results)) == metrics(own._task, outputs)
    outside, _ = made(target, "outside", f"trainer.test_views={views}")
    (name,) = outside.describe()["outputs"]
    assert name == ("numbers" if target == "numbers" else "logits")
    assert torch.allclose(outside(own.normalised(images))[name], outputs, atol=1e-6)
    assert own._task.outputs_of({name: outputs}) is outputs


@pytest.mark.parametrize("target", soaked(TASKS, []))
@pytest.mark.parametrize("preprocess", ["inside", "outside"])
def test_both_formats_give_the_same_for_every_task(target: str, preprocess: str, tmp_path: Path) -> None:
    program, own = made(target, preprocess, "trainer.test_views=flip")
    images = random_images(own._task.spec, 70)

    def given(stored: Tensor) -> Tensor:
        return own.normalised(stored) if preprocess == "outside" else stored

    def expected(stored: Tensor) -> dict[str, Tensor]:
        return program.results(own.outputs(stored))

    archive = program_files.write_torch_export(program, program.describe(), tmp_path / "m")
    with pytest.raises(ConfigError, match=r"opset=99: these releases of torch and onnx can't write it"):
        program_files.write_onnx(program, program.describe(), 99, tmp_path / "m.onnx")
    onnx = program_files.write_onnx(program, program.describe(), 18, tmp_path / "m.onnx")
    for found in (
        agreement.compare("torch_export", images, expected, lambda stored: archive(given(stored))),
        agreement.compare("onnx", images, expected, lambda stored: onnx(given(stored))),
    ):
        assert found.images == 70
        assert found.largest < 1e-5


class Counting(nn.Module):
    """Its operations depend on the values of its inputs, so they can't be recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(images.mean((2, 3)))
        return logits if images.sum() > 0 else -logits


def test_a_model_that_can_not_be_recorded_is_refused_in_one_line() -> None:
    task = task_for("class", "task=classification")
    program = Program(Counting().eval(), task, task.spec, MEAN, STD, "inside")
    with pytest.raises(ConfigError, match=r"format=onnx: torch.export can't record this model") as caught:
        program_files.trace(program, "onnx")
    assert "\n" not in str(caught.value)


def test_what_differs_is_found() -> None:
    def results(shift: float = 0.0, chosen: int = 1) -> dict[str, Tensor]:
        return {"probabilities": torch.full((4, 2), 0.5) + shift, "class": torch.full((4,), chosen)}

    images = torch.zeros(4, 3, 2, 2)
    # The first call has one image, and the second three.
    assert agreement.compare("onnx", images, lambda _: results(), lambda _: results(1e-6)).images == 4
    for wrong in (results(0.01), results(math.nan), results(chosen=0)):
        with pytest.raises(ConfigError, match=r"differs from the run's model on 4 images .*; no file is left"):
            agreement.compare("onnx", images, lambda _: results(), lambda _, wrong=wrong: wrong)  # type: ignore[misc]
    with pytest.raises(ConfigError, match=r"fails for a batch of 1 .class is missing"):
        agreement.compare("onnx", images, lambda _: results(), lambda _: {"probabilities": torch.full((4, 2), 0.5)})
