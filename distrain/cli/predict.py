"""Predicts the outputs of a run's model, such as classes, for image files."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from distrain.cli import output
from distrain.cli.evaluate import EvaluateSettings, config_for_evaluation
from distrain.cli.run_folder import RunFolder
from distrain.cli.run_model import RunModel, check_takes_files, decoded_spec
from distrain.cli.settings import RunSettings
from distrain.config.schema import DEVICE_DOC, DEVICES
from distrain.config.setting import setting
from distrain.data.base import Images
from distrain.data.decode import DecodeError, decode
from distrain.errors import ConfigError
from distrain.files.terminal import show
from distrain.runtime.device import available_cores
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.tasks import base as tasks
from distrain.tasks.base import Task
from distrain.tools.predicting import result_files
from distrain.tools.predicting.images import find_images
from distrain.tools.predicting.mask_files import MaskFiles
from distrain.tools.predicting.parts import Parts
from distrain.tools.predicting.result_files import ERROR, Prediction

log = logging.getLogger(__name__)

ON_ERROR = ("record", "skip", "stop")


@dataclass
class PredictSettings(RunSettings):
    """Keys of ``distrain predict``."""

    input: Any = setting("An image file, a folder (with its subfolders), or a list of these.", path=True)
    output: str | None = setting(
        "File for the result, .json, .jsonl, .csv or .parquet; - or null: JSON on standard output.", path=True
    )
    masks: str | None = setting(
        "Folder for a PNG file of class numbers for each image, by task=segmentation; null: none.", path=True
    )
    top: int = setting("Number of classes per image, the most probable first.", at_least=1)
    on_error: str = setting(
        "If an image can't be decoded: record the reason in the output as error, skip the image, or stop the command.",
        choices=ON_ERROR,
    )
    batch_size: int = setting("Images per forward pass.", at_least=1)
    device: str = setting(DEVICE_DOC, choices=DEVICES)
    allow: list[str] = setting(
        "Dotted prefixes, besides distrain's, from which the run's model and choices may be imported; their code runs."
    )


@dataclass(frozen=True)
class _Request:
    """A checked command.

    Attributes:
        settings: The keys.
        folder: The run.
        task: What the model was trained to do.
        target: The result file; ``None`` for standard output.
        paths: All images.
    """

    settings: PredictSettings
    folder: RunFolder
    task: Task
    target: Path | None
    paths: list[str]

    @classmethod
    def of(cls, settings: PredictSettings, world: World) -> _Request:
        """Refuses what can be refused without the weights."""
        folder = RunFolder.open(settings.run, settings.allow)
        task = tasks.build(folder.config, folder.spec)
        check_top(task, settings.top)
        target = None if settings.output in (None, "-") else Path(str(settings.output))
        if target is not None:
            result_files.check_suffix(str(target))
            output.check_writable(target)
        elif world.size > 1:
            problem = f"{world.size} ranks need a file for the result"
            raise ConfigError("output", settings.output, problem, result_files.SUFFIXES)
        if settings.masks is not None:
            _check_masks(task, settings.masks)
        check_takes_files(folder)
        return cls(settings, folder, task, target, find_images(settings.input))


def run(settings: PredictSettings, world: World | None = None) -> None:
    """Predicts for all images and writes the result; several ranks share the images.

    A result file is written in parts, and a command that was killed goes on with those that are finished; see
    :mod:`distrain.tools.predicting.parts`.

    Raises:
        ConfigError: The run, an image or the output can't be used.
        Failed: A rank of several failed, and the failure has been reported.
    """
    world = world or World.from_environment()
    request = _Request.of(settings, world)
    if request.target is None:
        predictions = _predict_all(request, world)
        output.write_text(None, result_files.to_json(predictions))
    elif world.size == 1:
        _predict_to_file(request, request.target, world, None)
    else:
        evaluation = EvaluateSettings(
            run=settings.run,
            checkpoint=settings.checkpoint,
            split="test",
            data_root=None,
            batch_size=None,
            device=settings.device,
            output=None,
            allow=settings.allow,
        )
        with Runtime(config_for_evaluation(request.folder, evaluation, world), world, keep_logs=False) as runtime:
            runtime.activity.phase = "evaluation"
            _predict_to_file(request, request.target, world, runtime)


def check(settings: PredictSettings, world: World) -> None:
    """Refuses what :func:`run` would refuse on these ranks, as far as that does not need the weights.

    Raises:
        ConfigError: The run, the checkpoint, the images or the output can't be used.
    """
    _Request.of(settings, world).folder.find_checkpoint(settings.checkpoint)


def _predict_to_file(request: _Request, target: Path, world: World, runtime: Runtime | None) -> None:
    """What each rank does: takes part after part until none is left; rank 0 then joins them."""
    settings, paths = request.settings, request.paths

    def barrier() -> None:
        if runtime is not None:
            runtime.communicator().barrier()

    def advance() -> None:
        if runtime is not None:
            runtime.activity.progress += 1

    predictor = Predictor(request.folder, request.task, settings, world)
    parts = Parts(target, paths, settings.batch_size, predictor.identity())
    with contextlib.closing(parts), contextlib.closing(predictor):
        if world.rank == 0 and (message := parts.start()):
            show(message)
        barrier()
        parts.check()
        finish = _finisher(settings, paths)
        with _bar(paths, parts.done(), shown=world.rank == 0) as bar:
            for number, images in parts.unfinished():
                parts.finish(number, [finish(row) for row in predictor.predict(images, advance)])
                if not bar.disable:
                    # Those of all ranks.
                    bar.update(parts.done() - bar.n)
        barrier()
        if world.rank == 0:
            _join(parts, target, request, advance)
        barrier()


def _join(parts: Parts, target: Path, request: _Request, advance: Callable[[], None]) -> None:
    """Writes the result file from all parts."""

    def rows() -> Iterator[Prediction]:
        for row in parts.rows():
            advance()
            yield row

    predicted, reason = _count(rows())
    count = len(request.paths)
    if not predicted:
        parts.remove()
        raise _nothing_decoded(request, reason)
    output.write(target, lambda path: result_files.write(path, target.suffix.lower(), rows))
    parts.remove()
    line = f"{predicted:,} images predicted: {target}"
    if predicted < count:
        done = "left out" if request.settings.on_error == "skip" else "in the output with their error"
        line += f"; {count - predicted:,} that can't be decoded are {done}"
    show(line)


def _predict_all(request: _Request, world: World) -> list[Prediction]:
    finish = _finisher(request.settings, request.paths)
    predictions = []
    predictor = Predictor(request.folder, request.task, request.settings, world)
    with contextlib.closing(predictor), _bar(request.paths) as bar:
        for row in predictor.predict(request.paths):
            predictions.append(finish(row))
            bar.update()
    predicted, reason = _count(predictions)
    if not predicted:
        raise _nothing_decoded(request, reason)
    return predictions


def _count(rows: Iterable[Prediction]) -> tuple[int, str]:
    """How many images have a prediction, and why the first one has none that has not."""
    count, reason = 0, ""
    for row in rows:
        count += ERROR not in row
        reason = reason or row.get(ERROR, "")
    return count, reason


def _nothing_decoded(request: _Request, reason: str) -> ConfigError:
    problem = f"none of {len(request.paths)} images can be decoded"
    return ConfigError("input", request.settings.input, f"{problem} ({reason})" if reason else problem)


def _bar(paths: Sequence[str], done: int = 0, *, shown: bool = True) -> tqdm[Any]:
    """A progress bar, on a terminal alone."""
    return tqdm(desc="predicting", total=len(paths), initial=done, unit="image", disable=None if shown else True)


def _finisher(settings: PredictSettings, paths: Sequence[str]) -> Callable[[Prediction], Prediction]:
    """What to do with each prediction as soon as it is made: write its mask, or drop it."""
    return _drop_mask if settings.masks is None else MaskFiles(Path(settings.masks), paths).write


def _check_masks(task: Task, folder: str) -> None:
    """Refuses ``masks`` if the task makes none, or if they can't be written there."""
    if len(task.output_shape) < 3:
        raise ConfigError("masks", folder, f"task={task.config.task.name} gives no class for each pixel", ["null"])
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("masks", folder, f"can't be made ({error.strerror})") from error


def _drop_mask(prediction: Prediction) -> Prediction:
    return {name: value for name, value in prediction.items() if name != "mask"}


def check_top(task: Task, top: int) -> None:
    """Refuses a number of ranked answers that the task doesn't have.

    Raises:
        ConfigError: ``top`` is too large.
    """
    largest = task.largest_top()
    if top > largest:
        problem = f"the run has {largest} classes" if largest > 1 else f"task={task.config.task.name} ranks no answers"
        raise ConfigError("top", top, problem)


def predict_files(folder: RunFolder, task: Task, settings: PredictSettings, world: World) -> list[Prediction]:
    """The predictions for all images that ``settings.input`` names, in their order, with their masks as arrays.

    Raises:
        ConfigError: The run or an image can't be used.
    """
    check_takes_files(folder)
    paths = find_images(settings.input)
    with contextlib.closing(Predictor(folder, task, settings, world)) as predictor:
        return list(predictor.predict(paths))


class Predictor:
    """Predicts for image files with a run's model.

    Images are processed as in an evaluation: by the decoder of image folders, then by the loader.

    Args:
        folder: The run.
        task: What the model was trained to do.
        settings: Selects the checkpoint, the device and the number of images per forward pass.
        world: This process.

    Raises:
        ConfigError: There is no such checkpoint or device, or the model's class is not allowed.
    """

    def __init__(self, folder: RunFolder, task: Task, settings: PredictSettings, world: World) -> None:
        self._task, self._settings, self._decoded = task, settings, decoded_spec(folder)
        weights = folder.weights(settings.checkpoint, settings.weights)
        self._checkpoint = weights.path
        self._model = RunModel(folder, task, weights, settings.device, settings.allow, world)
        self._pool = ThreadPoolExecutor(max(1, available_cores() // world.local_size))

    def identity(self) -> dict[str, Any]:
        """What the rows depend on besides the images, as plain data."""
        settings = self._settings
        return {
            "checkpoint": hashlib.sha256((self._checkpoint / "manifest.json").read_bytes()).hexdigest(),
            "weights": settings.weights,
            "top": settings.top,
            "on_error": settings.on_error,
            "masks": settings.masks,
            "device": self._model.device.type,
        }

    def close(self) -> None:
        """Ends the threads that decode."""
        self._pool.shutdown()

    def predict(self, paths: Sequence[str], advance: Callable[[], None] = lambda: None) -> Iterator[Prediction]:
        """Decodes images and yields their predictions in the order of the paths.

        Args:
            paths: The files.
            advance: Called after each batch.

        Raises:
            ConfigError: An image can't be decoded (with ``on_error=stop``), or the model's output for an image is not
                finite; the message names the image.
        """
        size = self._settings.batch_size
        for start in range(0, len(paths), size):
            chunk = paths[start : start + size]
            with warnings.catch_warnings():
                # Pillow warns about files that it can read nevertheless.
                warnings.filterwarnings("ignore", module=r"PIL\.")
                decoded = dict(enumerate(self._pool.map(self._decode, chunk)))
            pixels = {place: image for place, image in decoded.items() if not isinstance(image, DecodeError)}
            rows: Iterator[Prediction] = iter(())
            if pixels:
                stacked = torch.from_numpy(np.stack(list(pixels.values())))
                rows = self._predict([chunk[place] for place in pixels], stacked)
            for path, image in zip(chunk, decoded.values(), strict=True):
                if not isinstance(image, DecodeError):
                    yield next(rows)
                elif self._settings.on_error == "record":
                    yield {"path": path, ERROR: image.reason}
                else:
                    self._report_undecodable(path, image)
            advance()

    def predict_arrays(self, images: Images) -> Iterator[Prediction]:
        """Yields the predictions for images in memory; the entry ``path`` is the number of the image.

        Raises:
            ConfigError: The model's output for an image is not finite.
        """
        for places in torch.arange(len(images)).split(self._settings.batch_size):
            names = [str(place) for place in places.tolist()]
            yield from self._predict(names, images.pick(places))

    def _decode(self, path: str) -> npt.NDArray[np.uint8] | DecodeError:
        spec = self._decoded
        try:
            return decode(path, spec.height, spec.width, spec.channels)
        except DecodeError as error:
            return error

    def _report_undecodable(self, path: str, error: DecodeError) -> None:
        if self._settings.on_error == "stop":
            problem = f"can't be decoded ({error.reason}); on_error=record names such files in the output"
            raise ConfigError("input", path, problem) from error
        log.warning("left out %s", error)

    def _predict(self, paths: Sequence[str], pixels: Tensor) -> Iterator[Prediction]:
        outputs = self._model.outputs(pixels)
        finite = outputs.flatten(1).isfinite().all(1).tolist()
        if not all(finite):
            problem = f"the model's output for {paths[finite.index(False)]} is not finite; did the training diverge?"
            raise ConfigError("checkpoint", self._settings.checkpoint, problem)
        masks = self._task.masks(outputs)
        for index, entries in enumerate(self._task.predict(outputs, self._settings.top)):
            yield {"path": paths[index], **entries, **({} if masks is None else {"mask": masks[index].numpy()})}
