"""A run's model as it is served, and how a newer one is noticed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path

import torch
from typing_extensions import override

from distrain.checkpoint import format as checkpoint_format
from distrain.cli.run_folder import RunFolder
from distrain.cli.run_model import RunModel, check_takes_files, decoded_spec
from distrain.errors import ConfigError
from distrain.runtime.world import World
from distrain.tasks import base as tasks
from distrain.tools.serving.model import About, Answer, Pixels, ServedModel, Source


class RunSource(Source):
    """The checkpoint of a run that a name stands for, such as the best one.

    Args:
        run: The folder.
        checkpoint: ``best``, ``newest``, or the folder of a checkpoint.
        weights: ``last``, or the average that is taken instead.
        device: As in ``runtime.device``.
        allow: Dotted prefixes of allowed choices and model classes.
    """

    def __init__(self, run: str, checkpoint: str, weights: str, device: str, allow: Sequence[str]) -> None:
        self._run, self._checkpoint, self._weights = run, checkpoint, weights
        self._device, self._allow = device, list(allow)

    @override
    def state(self) -> Hashable:
        checkpoints = checkpoint_format.list_checkpoints(checkpoint_format.checkpoints_folder(Path(self._run)))
        return tuple((path.name, path.stat().st_mtime_ns) for path in checkpoints)

    @override
    def newest(self) -> Hashable:
        path = self.open().find_checkpoint(self._checkpoint)
        return path.name, path.stat().st_mtime_ns

    @override
    def load(self) -> ServedModel:
        return ServedRun(self.open(), self._checkpoint, self._weights, self._device, self._allow)

    def open(self) -> RunFolder:
        """The run, as it is now.

        Raises:
            ConfigError: It can't be read, or is not of images.
        """
        folder = RunFolder.open(self._run, self._allow)
        check_takes_files(folder)
        return folder


class ServedRun(ServedModel):
    """A run's model.

    Args:
        folder: The run.
        checkpoint: As for :class:`RunSource`.
        weights: Likewise.
        device: Likewise.
        allow: Likewise.

    Raises:
        ConfigError: There is no such checkpoint or device, or the task gives pictures.
    """

    def __init__(self, folder: RunFolder, checkpoint: str, weights: str, device: str, allow: Sequence[str]) -> None:
        self._task = tasks.build(folder.config, folder.spec)
        check_task(self._task)
        read = folder.weights(checkpoint, weights)
        self._model = RunModel(folder, self._task, read, device, allow, World(0, 1, 0, 1, ""))
        # Other threads decode and answer meanwhile.
        self._model.record()
        spec = decoded_spec(folder)
        self.about = About(
            name=read.path.name,
            step=read.step,
            model=folder.config.model.name,
            task=folder.config.task.name,
            classes=folder.spec.classes,
            shape=(spec.channels, spec.height, spec.width),
            largest_top=self._task.largest_top(),
        )

    @override
    def answer(self, pixels: Pixels, top: int) -> list[Answer | None]:
        outputs = self._model.outputs(torch.from_numpy(pixels))
        finite = outputs.flatten(1).isfinite().all(1)
        answers: list[Answer | None] = [None] * len(outputs)
        places = finite.nonzero().flatten().tolist()
        for place, row in zip(places, self._task.predict(outputs[finite], top), strict=True):
            answers[place] = row
        return answers


def check_task(task: tasks.Task) -> None:
    """Refuses a task whose answers are pictures.

    Raises:
        ConfigError: It is such a task.
    """
    if len(task.output_shape) > 1:
        problem = f"task={task.config.task.name} gives a class for each pixel, and serve answers with classes of images"
        raise ConfigError("run", task.config.run_dir, f"{problem}; distrain predict masks=FOLDER writes masks")
