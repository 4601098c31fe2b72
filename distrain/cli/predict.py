"""Predicts the outputs of a run's model, such as classes, for image files."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from distrain.cli import output
from distrain.cli.run_folder import RunFolder
from distrain.cli.settings import RunSettings, require_one_process
from distrain.config.schema import DEVICE_DOC, DEVICES
from distrain.config.setting import setting
from distrain.data.base import Images
from distrain.data.decode import SUFFIXES, DecodeError, decode
from distrain.data.loader import Loader
from distrain.errors import ConfigError
from distrain.models.outputs import logits_of
from distrain.models.tensors import convert
from distrain.runtime.device import available_cores, choose_device
from distrain.runtime.world import World
from distrain.strategies.precision import Precision
from distrain.tasks import base as tasks
from distrain.tasks.base import Task
from distrain.training import auto_format

log = logging.getLogger(__name__)

#: Numbers of channels that image files are decoded to.
_FILE_CHANNELS = (1, 3)
_OUTPUT_SUFFIXES = (".json", ".csv")


@dataclass
class PredictSettings(RunSettings):
    """Keys of ``distrain predict``."""

    input: Any = setting("An image file, a folder (with its subfolders), or a list of these.", path=True)
    output: str | None = setting("File for the result, .json or .csv; - or null: JSON on standard output.", path=True)
    masks: str | None = setting(
        "Folder for a PNG file of class numbers for each image, by task=segmentation; null: none.", path=True
    )
    top: int = setting("Number of classes per image, the most probable first.", at_least=1)
    on_error: str = setting(
        "If an image can't be decoded: stop the command, or skip the image.", choices=("stop", "skip")
    )
    batch_size: int = setting("Images per forward pass.", at_least=1)
    device: str = setting(DEVICE_DOC, choices=DEVICES)
    allow: list[str] = setting(
        "Dotted prefixes, besides distrain's, from which the run's model and choices may be imported; their code runs."
    )


#: The prediction for a file: its ``path``, and the entries that the task makes from the model's output. ``mask``, of a
#: task that makes one: the class of each pixel, uint8 [H, W]; from the command, the file that holds it.
Prediction = dict[str, Any]


def run(settings: PredictSettings, world: World | None = None) -> list[Prediction]:
    """Predicts for all images and writes the result.

    Returns:
        The predictions, in the order of the images.

    Raises:
        ConfigError: The run, an image or the output can't be used.
    """
    world = world or World.from_environment()
    require_one_process("predict", world)
    folder = RunFolder.open(settings.run, settings.allow)
    task = tasks.build(folder.config, folder.spec)
    check_top(task, settings.top)
    target = _output_path(settings.output)
    if settings.masks is not None:
        _check_masks(task, settings.masks)
    masks = None if settings.masks is None else MaskFiles(Path(settings.masks))
    predictions = predict_files(folder, task, settings, world, masks.write if masks else _drop_mask)
    as_csv = target is not None and target.suffix.lower() == ".csv"
    output.write_text(target, to_csv(predictions) if as_csv else to_json(predictions))
    return predictions


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


class MaskFiles:
    """Writes masks as PNG files of class numbers, named after the images.

    Args:
        folder: Where to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._used = folder, dict[str, int]()

    def write(self, prediction: Prediction) -> Prediction:
        """Writes a prediction's mask, and returns the prediction with the file's path instead of it.

        Raises:
            ConfigError: The file can't be written.
        """
        stem = Path(prediction["path"]).stem
        self._used[stem] = count = self._used.get(stem, 0) + 1
        path = self._folder / (f"{stem}.png" if count == 1 else f"{stem}_{count}.png")
        try:
            Image.fromarray(prediction["mask"]).save(path)
        except OSError as error:
            raise ConfigError("masks", path, f"can't be written ({error.strerror or error})") from error
        return {**prediction, "mask": str(path)}


def check_top(task: Task, top: int) -> None:
    """Refuses a number of ranked answers that the task doesn't have.

    Raises:
        ConfigError: ``top`` is too large.
    """
    largest = task.largest_top()
    if top > largest:
        problem = f"the run has {largest} classes" if largest > 1 else f"task={task.config.task.name} ranks no answers"
        raise ConfigError("top", top, problem)


def predict_files(
    folder: RunFolder,
    task: Task,
    settings: PredictSettings,
    world: World,
    finish: Callable[[Prediction], Prediction] = lambda prediction: prediction,
) -> list[Prediction]:
    """The predictions for all images that ``settings.input`` names, in their order.

    Args:
        folder: The run.
        task: What the model was trained to do.
        settings: The keys.
        world: This process.
        finish: What to do with each prediction as soon as it is made.

    Raises:
        ConfigError: The run or an image can't be used.
    """
    if folder.spec.channels not in _FILE_CHANNELS:
        raise ConfigError("run", settings.run, f"its images have {folder.spec.channels} channels; files give 1 or 3")
    if folder.spec.dtype != "uint8":
        problem = "it was trained on floating-point arrays, and files give bytes; use distrain.predict(run, array)"
        raise ConfigError("run", settings.run, problem)
    paths = find_images(settings.input)
    predictor = Predictor(folder, task, settings, world)
    with warnings.catch_warnings():
        # Pillow warns about files that it can read nevertheless.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        predictions = [finish(prediction) for prediction in predictor.predict(paths)]
    if not predictions:
        raise ConfigError("input", settings.input, f"none of {len(paths)} images can be decoded")
    return predictions


def _output_path(setting: str | None) -> Path | None:
    """The result file; ``None`` for standard output."""
    if setting is None or setting == "-":
        return None
    path = Path(setting)
    if path.suffix.lower() not in _OUTPUT_SUFFIXES:
        raise ConfigError("output", setting, "the ending must name the format", _OUTPUT_SUFFIXES)
    output.check_writable(path)
    return path


def find_images(setting: object) -> list[str]:
    """The image files that ``input`` names: given files, and all JPEG and PNG files below given folders, by name.

    Hidden files and folders are left out, and links to folders are not followed.

    Args:
        setting: A path or a list of paths.

    Raises:
        ConfigError: A path does not exist, a folder has no images, or ``setting`` is something else.
    """
    paths = setting if isinstance(setting, list) else [setting]
    if not paths or any(isinstance(path, dict | list) or path in (None, "") for path in paths):
        raise ConfigError("input", setting, "must be an image file, a folder, or a list of them")
    images: list[str] = []
    for name in map(str, paths):
        path = Path(name)
        if path.is_dir():
            below = list(_images_below(path))
            if not below:
                raise ConfigError("input", name, f"the folder has no {', '.join(SUFFIXES)} files")
            images += below
        elif path.exists():
            images.append(os.fspath(path))
        else:
            raise ConfigError("input", name, "is neither a file nor a folder")
    return images


def _images_below(folder: Path) -> Iterator[str]:
    def fail(error: OSError) -> None:
        raise ConfigError("input", error.filename, f"can't be read ({error.strerror})") from error

    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = os.path.join(parent, name)  # noqa: PTH118 - keeps names that are not UTF-8, and a leading ./
            # Opening a pipe that has the name of an image would block.
            if name.lower().endswith(SUFFIXES) and not name.startswith(".") and Path(path).is_file():
                yield path


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
        config = folder.config
        config.runtime.device = settings.device
        self._folder, self._task, self._settings = folder, task, settings
        self._device = choose_device(config, world)
        self._precision = Precision(config.trainer.precision, self._device)
        model = folder.model(folder.weights(settings.checkpoint, settings.weights), settings.allow)
        self._layout = auto_format.memory_format(config, self._device, model)
        convert(model, self._precision.dtype, self._device)
        self._model: nn.Module = model.to(memory_format=self._layout)  # type: ignore[call-overload]

    def predict(self, paths: Sequence[str]) -> Iterator[Prediction]:
        """Decodes images and yields their predictions in the order of the paths.

        Raises:
            ConfigError: An image can't be decoded (with ``on_error=stop``), or the model's output for an image is not
                finite; the message names the image.
        """
        size, skipped = self._settings.batch_size, 0
        bar = tqdm(desc="predicting", total=len(paths), unit="image", disable=None)
        with bar, ThreadPoolExecutor(available_cores()) as pool:
            for start in range(0, len(paths), size):
                chunk = paths[start : start + size]
                decoded_paths: list[str] = []
                pixels: list[npt.NDArray[np.uint8]] = []
                for path, decoded in zip(chunk, pool.map(self._decode, chunk), strict=True):
                    if isinstance(decoded, DecodeError):
                        self._report_undecodable(path, decoded)
                        skipped += 1
                    else:
                        decoded_paths.append(path)
                        pixels.append(decoded)
                if decoded_paths:
                    yield from self._predict(decoded_paths, torch.from_numpy(np.stack(pixels)))
                bar.update(len(chunk))
        if skipped:
            log.warning("left out %d of %d images that can't be decoded", skipped, len(paths))

    def predict_arrays(self, images: Images) -> Iterator[Prediction]:
        """Yields the predictions for images in memory; the entry ``path`` is the number of the image.

        Raises:
            ConfigError: The model's output for an image is not finite.
        """
        for places in torch.arange(len(images)).split(self._settings.batch_size):
            names = [str(place) for place in places.tolist()]
            yield from self._predict(names, images.pick(places))

    def _decode(self, path: str) -> npt.NDArray[np.uint8] | DecodeError:
        spec = self._folder.spec
        try:
            return decode(path, spec.height, spec.width, spec.channels)
        except DecodeError as error:
            return error

    def _report_undecodable(self, path: str, error: DecodeError) -> None:
        if self._settings.on_error == "stop":
            problem = f"can't be decoded ({error.reason}); on_error=skip leaves such files out"
            raise ConfigError("input", path, problem) from error
        log.warning("left out %s", error)

    @torch.inference_mode()
    def _predict(self, paths: Sequence[str], pixels: Tensor) -> Iterator[Prediction]:
        outputs = self._outputs(pixels)
        finite = outputs.flatten(1).isfinite().all(1).tolist()
        if not all(finite):
            problem = f"the model's output for {paths[finite.index(False)]} is not finite; did the training diverge?"
            raise ConfigError("checkpoint", self._settings.checkpoint, problem)
        masks = self._task.masks(outputs)
        for index, entries in enumerate(self._task.predict(outputs, self._settings.top)):
            yield {"path": paths[index], **entries, **({} if masks is None else {"mask": masks[index].numpy()})}

    def _logits(self, inputs: Tensor) -> Tensor:
        return logits_of(self._model(inputs))

    def _outputs(self, pixels: Tensor) -> Tensor:
        """The model's outputs [n, …], as float64 on the CPU, for images [n, C, H, W]."""
        loader = Loader(
            Images(pixels, torch.zeros(len(pixels), dtype=torch.int64)),
            batch_size=len(pixels),
            shard=(0, 1),
            mean=self._folder.mean,
            std=self._folder.std,
            device=self._device,
            dtype=self._precision.dtype,
            memory_format=self._layout,
        )
        with self._precision.autocast():
            parts = [self._task.evaluate(self._logits, batch.inputs) for batch in loader.epoch(0)]
        return torch.cat(parts).cpu().double()


def to_json(predictions: Sequence[Prediction]) -> str:
    """JSON: a list with an object per image."""
    return json.dumps(predictions, indent=2) + "\n"


def to_csv(predictions: Sequence[Prediction]) -> str:
    """CSV with a header; columns of the second ranked answer end with ``_2``, of the third with ``_3``, and so on.

    Several labels are joined by ``;``. A value by name, such as the probability of a label, has a column of its own.
    """
    rows = [_to_cells(prediction) for prediction in predictions]
    columns = dict.fromkeys(column for row in rows for column in row)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _to_cells(prediction: Prediction) -> dict[str, Any]:
    """The cells of a prediction, by column."""
    cells: dict[str, Any] = {}
    for name, value in prediction.items():
        if isinstance(value, dict):
            cells |= {f"{name}.{inner}": number for inner, number in value.items()}
        elif name != "top":
            cells[name] = ";".join(map(str, value)) if isinstance(value, list) else value
    for rank, answer in enumerate(prediction.get("top", ())[1:], start=2):
        cells |= {f"{name}_{rank}": value for name, value in answer.items()}
    return cells
