"""Predicting the classes of image files by a run's model."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from distrain.cli import output
from distrain.cli.run_folder import RunFolder
from distrain.cli.settings import RunSettings, require_one_process
from distrain.config.schema import setting
from distrain.data.base import Images
from distrain.data.decode import SUFFIXES, DecodeError, decode
from distrain.data.loader import Loader
from distrain.errors import ConfigError
from distrain.runtime.device import available_cores, choose_device
from distrain.runtime.world import World
from distrain.strategies.precision import Precision
from distrain.tasks import base as tasks
from distrain.tasks.base import Task
from distrain.training import auto_format

log = logging.getLogger(__name__)

_FILE_CHANNELS = (1, 3)
_FORMATS = (".json", ".csv")


@dataclass
class PredictSettings(RunSettings):
    """Keys of ``launch/predict.py``."""

    input: Any = setting("An image file, a folder (searched with all its subfolders), or a list of them.")
    output: str | None = setting("Result file, .json or .csv; - or null: JSON on the standard output.")
    top: int = setting("How many classes each image gets, the most probable first.", at_least=1)
    on_error: str = setting("What a broken image does: end the command, or be left out.", choices=("stop", "skip"))
    batch_size: int = setting("Images the model sees at once.", at_least=1)
    device: str = setting("auto: cuda where torch sees a GPU, else cpu.", choices=("auto", "cpu", "cuda"))
    allow: list[str] = setting("Dotted prefixes that the model's _target_ may have besides distrain.models.")


#: What the model says about a file: its ``path``, and what the task says of the output.
Prediction = dict[str, Any]


def run(settings: PredictSettings, world: World | None = None) -> list[Prediction]:
    """Predicts, and writes the result.

    Raises:
        ConfigError: The run, an image or the output can't be used.
    """
    world = world or World.from_environment()
    require_one_process("predict", world)
    folder = RunFolder.open(settings.run, settings.allow)
    task = tasks.build(folder.config, folder.spec)
    if settings.top > task.largest_top():
        raise ConfigError("top", settings.top, f"the run has {task.largest_top()} classes")
    if folder.spec.channels not in _FILE_CHANNELS:
        raise ConfigError("run", settings.run, f"its images have {folder.spec.channels} channels; files give 1 or 3")
    target = _target(settings.output)
    paths = find_images(settings.input)
    predictor = Predictor(folder, task, settings, world)
    with warnings.catch_warnings():
        # About files that Pillow reads all the same.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        found = list(predictor.predict(paths))
    if not found:
        raise ConfigError("input", settings.input, f"none of {len(paths)} images can be decoded")
    as_csv = target is not None and target.suffix.lower() == ".csv"
    output.write_text(target, to_csv(found) if as_csv else to_json(found))
    return found


def _target(wanted: str | None) -> Path | None:
    if wanted is None or wanted == "-":
        return None
    path = Path(wanted).expanduser()
    if path.suffix.lower() not in _FORMATS:
        raise ConfigError("output", wanted, "its ending says the format", _FORMATS)
    output.check_writable(path)
    return path


def find_images(wanted: object) -> list[str]:
    """The files that ``input`` names: files as they are given, and below folders all JPEG and PNG files by name.

    Hidden files and folders are left out, and links to folders are not followed.

    Raises:
        ConfigError: A path is not there, a folder has no images, or ``input`` is neither a path nor a list of them.
    """
    given = wanted if isinstance(wanted, list) else [wanted]
    if not given or any(isinstance(path, dict | list) or path in (None, "") for path in given):
        raise ConfigError("input", wanted, "must be an image file, a folder, or a list of them")
    found: list[str] = []
    for path in map(str, given):
        place = Path(path).expanduser()
        if place.is_dir():
            below = list(_images_below(place))
            if not below:
                raise ConfigError("input", path, f"the folder has no {', '.join(SUFFIXES)} files")
            found += below
        elif place.exists():
            found.append(os.fspath(place))
        else:
            raise ConfigError("input", path, "is neither a file nor a folder")
    return found


def _images_below(folder: Path) -> Iterator[str]:
    def fail(error: OSError) -> None:
        raise ConfigError("input", error.filename, f"can't be read ({error.strerror})") from error

    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = os.path.join(parent, name)  # noqa: PTH118 - keeps names that are no UTF-8, and ./ away
            # A pipe that somebody named like an image would keep its reader waiting.
            if name.lower().endswith(SUFFIXES) and not name.startswith(".") and Path(path).is_file():
                yield path


class Predictor:
    """A run's model, ready for files.

    Pixels take the way they take in an evaluation: the image folder's decoder, then the loader.

    Args:
        folder: The run.
        task: What it was trained to do.
        settings: Which checkpoint, where to compute, and how many images at once.
        world: This process.

    Raises:
        ConfigError: There is no such checkpoint or device, or the model may not be built.
    """

    def __init__(self, folder: RunFolder, task: Task, settings: PredictSettings, world: World) -> None:
        config = folder.config
        config.runtime.device = settings.device
        self._folder, self._task, self._settings = folder, task, settings
        self._device = choose_device(config, world)
        self._precision = Precision(config.trainer.precision, self._device)
        model = folder.model(folder.weights(settings.checkpoint), settings.allow)
        self._layout = auto_format.memory_format(config, self._device, model)
        model.to(device=self._device, dtype=self._precision.dtype)
        self._model: nn.Module = model.to(memory_format=self._layout)  # type: ignore[call-overload]

    def predict(self, paths: Sequence[str]) -> Iterator[Prediction]:
        """Decodes and predicts, in the order of the paths; a broken image ends it or is left out and named.

        Raises:
            ConfigError: Names the broken image, or the one for which the model gives no number.
        """
        size, skipped = self._settings.batch_size, 0
        bar = tqdm(desc="predicting", total=len(paths), unit="image", disable=None)
        with bar, ThreadPoolExecutor(available_cores()) as pool:
            for start in range(0, len(paths), size):
                chunk = paths[start : start + size]
                kept: list[str] = []
                pixels: list[npt.NDArray[np.uint8]] = []
                for path, decoded in zip(chunk, pool.map(self._decode, chunk), strict=True):
                    if isinstance(decoded, DecodeError):
                        self._broken(path, decoded)
                        skipped += 1
                    else:
                        kept.append(path)
                        pixels.append(decoded)
                if kept:
                    yield from self._predict(kept, torch.from_numpy(np.stack(pixels)))
                bar.update(len(chunk))
        if skipped:
            log.warning("left out %d of %d images that can't be decoded", skipped, len(paths))

    def _decode(self, path: str) -> npt.NDArray[np.uint8] | DecodeError:
        spec = self._folder.spec
        try:
            return decode(path, spec.height, spec.width, spec.channels)
        except DecodeError as error:
            return error

    def _broken(self, path: str, error: DecodeError) -> None:
        if self._settings.on_error == "stop":
            problem = f"can't be decoded ({error.reason}); on_error=skip leaves such files out"
            raise ConfigError("input", path, problem) from error
        log.warning("left out %s", error)

    @torch.inference_mode()
    def _predict(self, paths: Sequence[str], pixels: Tensor) -> Iterator[Prediction]:
        outputs = self._outputs(pixels)
        whole = outputs.flatten(1).isfinite().all(1).tolist()
        if not all(whole):
            problem = f"the model's answer to {paths[whole.index(False)]} is not a number; did the training diverge?"
            raise ConfigError("checkpoint", self._settings.checkpoint, problem)
        for path, meaning in zip(paths, self._task.predict(outputs, self._settings.top), strict=True):
            yield {"path": path, **meaning}

    def _outputs(self, pixels: Tensor) -> Tensor:
        """From uint8 [n, C, H, W] to the model's outputs [n, …] on the CPU in double precision."""
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
            parts = [self._task.evaluate(self._model, batch.inputs) for batch in loader.epoch(0)]
        return torch.cat(parts).double().cpu()


def to_json(predictions: Sequence[Prediction]) -> str:
    """A list of objects with ``path`` and what the task says of the file."""
    return json.dumps(predictions, indent=2) + "\n"


def to_csv(predictions: Sequence[Prediction]) -> str:
    """A table with a header; of ranked answers the second has columns with ``_2`` behind their names, and so on."""
    rows = [_flat(prediction) for prediction in predictions]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(prediction: Prediction) -> dict[str, Any]:
    """A prediction as cells by column."""
    cells = {name: value for name, value in prediction.items() if name != "top"}
    for place, answer in enumerate(prediction.get("top", ())[1:], start=2):
        cells |= {f"{name}_{place}": value for name, value in answer.items()}
    return cells
