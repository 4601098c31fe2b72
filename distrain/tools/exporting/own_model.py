"""The run's own model, as an evaluation uses it: what an exported program is compared with."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distrain.data.base import Images
from distrain.data.loader import Loader
from distrain.models.outputs import logits_of
from distrain.models.tensors import convert
from distrain.strategies.precision import Precision
from distrain.tasks.base import Task

_CPU = torch.device("cpu")
#: Images per forward pass.
_BATCH = 64


class OwnModel:
    """A model with its images normalised by the loader, on the CPU.

    Args:
        model: In evaluation mode; it is copied.
        task: What it was trained to do.
        mean: Channel means; see :class:`~distrain.data.loader.Loader`.
        std: Channel standard deviations.
        precision: A value of ``trainer.precision``.
    """

    def __init__(
        self, model: nn.Module, task: Task, mean: Sequence[float], std: Sequence[float], precision: str = "fp32"
    ) -> None:
        self._task, self._mean, self._std = task, mean, std
        self._precision = Precision(precision, _CPU)
        self._model = convert(copy.deepcopy(model), self._precision.dtype)

    def normalised(self, images: Tensor) -> Tensor:
        """Images as the model takes them."""
        loader = Loader(
            Images(images, torch.zeros(len(images), dtype=torch.int64)),
            batch_size=len(images),
            shard=(0, 1),
            mean=self._mean,
            std=self._std,
            device=_CPU,
            dtype=self._precision.dtype,
            memory_format=torch.contiguous_format,
        )
        (batch,) = loader.epoch(0)
        return batch.inputs

    @torch.inference_mode()
    def outputs(self, images: Tensor) -> Tensor:
        """The model's outputs for images as they are stored."""
        with self._precision.autocast():
            return self._task.evaluate(lambda views: logits_of(self._model(views)), self.normalised(images))

    def decisions(self, images: Tensor) -> Tensor | None:
        """What the outputs stand for, such as a class for each image; ``None`` if the task decides nothing."""
        parts = [self._task.decide(self.outputs(batch)) for batch in images.split(_BATCH)]
        known = [part for part in parts if part is not None]
        return torch.cat(known) if known else None
