"""A run's model as an evaluation uses it: images are resized and normalised by the loader, in the run's precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distrain.cli.run_folder import RunFolder, Weights
from distrain.data.base import DataSpec, Images
from distrain.data.image_files import DecodedImagesConfig, stored_spec
from distrain.data.loader import Loader
from distrain.errors import ConfigError
from distrain.models.outputs import logits_of
from distrain.models.recorded import record
from distrain.models.tensors import convert
from distrain.runtime.device import choose_device
from distrain.runtime.world import World
from distrain.strategies.precision import Precision
from distrain.tasks.base import Task
from distrain.training import auto_format

#: Numbers of channels that image files are decoded to.
_FILE_CHANNELS = (1, 3)


class RunModel:
    """A model on its device, with what is done to images before it and with outputs after it.

    Args:
        folder: The run.
        task: What the model was trained to do.
        weights: Those of the model.
        device: As in ``runtime.device``.
        allow: Dotted prefixes of allowed model classes.
        world: This process.

    Attributes:
        device: Where the model is.

    Raises:
        ConfigError: There is no such device, or the model's class is not allowed.
    """

    def __init__(
        self, folder: RunFolder, task: Task, weights: Weights, device: str, allow: Sequence[str], world: World
    ) -> None:
        config = folder.config
        config.runtime.device = device
        self._folder, self._task = folder, task
        self.device = choose_device(config, world)
        self._precision = Precision(config.trainer.precision, self.device)
        model = folder.model(weights, allow)
        self._layout = auto_format.memory_format(config, self.device, model)
        convert(model, self._precision.dtype, self.device)
        self._model: nn.Module = model.to(memory_format=self._layout)  # type: ignore[call-overload]

    @torch.inference_mode()
    def outputs(self, pixels: Tensor) -> Tensor:
        """The model's outputs [n, …], as float64 on the CPU, for images [n, C, H, W] as they are stored."""
        loader = Loader(
            Images(pixels, torch.zeros(len(pixels), dtype=torch.int64)),
            batch_size=len(pixels),
            shard=(0, 1),
            mean=self._folder.mean,
            std=self._folder.std,
            device=self.device,
            dtype=self._precision.dtype,
            memory_format=self._layout,
            # There are no targets, and so no masks that would be resized too.
            spec=dataclasses.replace(self._folder.spec, target="class"),
            shown=self._folder.config.data.eval_crop,
        )
        with self._precision.autocast():
            parts = [self._task.evaluate(self._logits, batch.inputs) for batch in loader.epoch(0)]
        return torch.cat(parts).cpu().double()

    def record(self) -> None:
        """Runs the model as a :mod:`program <distrain.models.recorded>` from now on, where that computes the same."""
        if self.device.type != "cpu" or self._precision.is_mixed:
            return
        spec = self._folder.spec
        example = torch.zeros(2, spec.channels, spec.height, spec.width, dtype=self._precision.dtype)
        self._model = record(self._model.eval(), example.contiguous(memory_format=self._layout))

    def _logits(self, inputs: Tensor) -> Tensor:
        return logits_of(self._model(inputs))


def decoded_spec(folder: RunFolder) -> DataSpec:
    """Height, width and channels that image files are decoded to, as the run's data set decodes them."""
    data = folder.config.data
    return stored_spec(data, folder.spec) if isinstance(data, DecodedImagesConfig) else folder.spec


def check_takes_files(folder: RunFolder) -> None:
    """Refuses a run whose images files can't give.

    Raises:
        ConfigError: It was trained on images of other channels or types.
    """
    if folder.spec.channels not in _FILE_CHANNELS:
        raise ConfigError("run", folder.path, f"its images have {folder.spec.channels} channels; files give 1 or 3")
    if folder.spec.dtype != "uint8":
        problem = "it was trained on floating-point arrays, and files give bytes; use distrain.predict(run, array)"
        raise ConfigError("run", folder.path, problem)
