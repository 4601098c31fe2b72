"""The model as it is exported: with the task's views of an image and, if wanted, normalisation and probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distrain.data.base import DataSpec
from distrain.models.outputs import logits_of
from distrain.tasks.base import Task

#: Name of the only input of an exported program.
INPUT = "images"
#: Where images are normalised and outputs become probabilities: in the program, or by who calls it.
INSIDE, OUTSIDE = PREPROCESS = ("inside", "outside")


class Program(nn.Module):
    """What a file of ``format=onnx`` or ``format=torch_export`` computes, in float32.

    With ``preprocess=inside`` it takes images as they are stored: uint8 ``[N, C, H, W]`` from 0 to 255 (floating-point
    numbers, if the run was trained on such), and returns :meth:`distrain.tasks.base.Task.named_results`. With
    ``preprocess=outside`` it takes normalised images and returns what the model does.

    Args:
        model: In evaluation mode; moved to float32 already.
        task: What it was trained to do.
        spec: Of the images.
        mean: Channel means, for pixel values in [0, 1]; for the numbers themselves if the images are floating point.
        std: Channel standard deviations, likewise.
        preprocess: One of :data:`PREPROCESS`.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self, model: nn.Module, task: Task, spec: DataSpec, mean: Sequence[float], std: Sequence[float], preprocess: str
    ) -> None:
        super().__init__()
        self.model = model
        self.preprocess = preprocess
        self._task, self._spec = task, spec
        # As the loader does it, so that inputs are equal to the last bit.
        one = 255 if spec.dtype == "uint8" else 1
        self.register_buffer("shift", _per_channel([one * value for value in mean]))
        self.register_buffer("scale", _per_channel([1 / (one * value) for value in std]))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps a batch of images to the results by name."""
        inside = self.preprocess == INSIDE
        inputs = images.to(torch.float32).sub(self.shift).mul(self.scale) if inside else images
        outputs = self._task.evaluate(lambda views: logits_of(self.model(views)), inputs)
        return self.results(outputs)

    def results(self, outputs: Tensor) -> dict[str, Tensor]:
        """What is returned for the model's outputs."""
        return self._task.named_results(outputs) if self.preprocess == INSIDE else {self._task.output_name: outputs}

    @property
    def input_dtype(self) -> torch.dtype:
        """Type of the images that the program takes."""
        return torch.uint8 if self.preprocess == INSIDE and self._spec.dtype == "uint8" else torch.float32

    def example(self, count: int) -> Tensor:
        """Images of noise that the program takes."""
        return random_images(self._spec, count).to(self.input_dtype)

    def describe(self) -> dict[str, Any]:
        """Inputs and outputs for users of the file, as plain data; the first dimension is the batch."""
        name = str(self.input_dtype).removeprefix("torch.")
        if self.preprocess == OUTSIDE:
            values = "(pixel / 255 - mean) / std" if self._spec.dtype == "uint8" else "(value - mean) / std"
        else:
            values = "pixels from 0 to 255" if self._spec.dtype == "uint8" else "numbers as in the training data"
        with torch.inference_mode():
            results = self(self.example(1))
        outputs = {
            name: {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": ["batch", *tensor.shape[1:]]}
            for name, tensor in results.items()
        }
        shape = ["batch", self._spec.channels, self._spec.height, self._spec.width]
        return {
            "preprocess": self.preprocess,
            "inputs": {INPUT: {"dtype": name, "shape": shape, "values": values}},
            "outputs": outputs,
        }


def random_images(spec: DataSpec, count: int) -> Tensor:
    """Images of noise ``[count, C, H, W]`` of the type in which the run's images are stored."""
    noise = torch.rand(count, spec.channels, spec.height, spec.width, generator=torch.Generator().manual_seed(0))
    return noise.mul(256).to(torch.uint8) if spec.dtype == "uint8" else noise


def _per_channel(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).to(torch.float32).view(1, -1, 1, 1)
