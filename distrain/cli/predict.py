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

from distrain.cli import app, output
from distrain.cli.run_folder import RunFolder
from distrain.cli.settings import RunSettings, one_process
from distrain.config.schema import setting
from distrain.data.base import Images
from distrain.data.decode import SUFFIXES, DecodeError, decode
from distrain.data.evaluation_views import averaged
from distrain.data.loader import Loader
from distrain.errors import ConfigError
from distrain.optim import losses
from distrain.runtime.device import available_cores, choose_device
from distrain.runtime.world import World
from distrain.strategies.precision import Precision

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


@dataclass(frozen=True)
class Prediction:
    """What the model says about a file: classes and their probabilities, the most probable first."""

    path: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


def run(settings: PredictSettings, world: World | None = None) -> list[Prediction]:
    """Predicts, and writes the result.

    Raises:
        ConfigError: The run, an image or the output can't be used.
    """
    world = world or World.from_environment()
    one_process("predict", world)
    folder = RunFolder.open(settings.run)
    if settings.top > len(folder.spec.classes):
        raise ConfigError("top", settings.top, f"the run has {len(folder.spec.classes)} classes")
    if folder.spec.channels not in _FILE_CHANNELS:
        raise ConfigError("run", settings.run, f"its images have {folder.spec.channels} channels; files give 1 or 3")
    target = _target(settings.output)
    paths = find_images(settings.input)
    predictor = Predictor(folder, settings, world)
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
    output.check(path)
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
        settings: Which checkpoint, where to compute, and how many images at once.
        world: This process.

    Raises:
        ConfigError: There is no such checkpoint or device, or the model may not be built.
    """

    def __init__(self, folder: RunFolder, settings: PredictSettings, world: World) -> None:
        config = folder.config
        config.runtime.device = settings.device
        self._folder, self._settings = folder, settings
        self._device = choose_device(config, world)
        self._views = config.trainer.test_views
        self._precision = Precision(config.trainer.precision, self._device)
        self._probabilities = losses.build(config.loss).probabilities
        model = folder.model(folder.weights(settings.checkpoint), settings.allow)
        self._layout = app.memory_format(config, self._device, model)
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
        logits = self._logits(pixels)
        whole = logits.isfinite().all(1).tolist()
        if not all(whole):
            problem = f"the model's answer to {paths[whole.index(False)]} is not a number; did the training diverge?"
            raise ConfigError("checkpoint", self._settings.checkpoint, problem)
        # By logits, because probabilities may round to the same; stable, so that the first is evaluation's argmax.
        order = logits.sort(dim=1, descending=True, stable=True).indices[:, : self._settings.top]
        probabilities = self._probabilities(logits).gather(1, order)
        names = self._folder.spec.classes
        for path, best, values in zip(paths, order.tolist(), probabilities.tolist(), strict=True):
            yield Prediction(path, tuple(names[index] for index in best), tuple(values))

    def _logits(self, pixels: Tensor) -> Tensor:
        """From uint8 [n, C, H, W] to [n, classes] on the CPU in double precision."""
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
            parts = [averaged(self._model, batch.images, self._views) for batch in loader.epoch(0)]
        return torch.cat(parts).double().cpu()


def to_json(found: Sequence[Prediction]) -> str:
    """A list of objects with ``path``, ``class`` and ``probability``, and with ``top`` where more were asked for."""
    rows = []
    for one in found:
        row: dict[str, Any] = {"path": one.path, "class": one.classes[0], "probability": one.probabilities[0]}
        if len(one.classes) > 1:
            row["top"] = [
                {"class": name, "probability": value}
                for name, value in zip(one.classes, one.probabilities, strict=True)
            ]
        rows.append(row)
    return json.dumps(rows, indent=2) + "\n"


def to_csv(found: Sequence[Prediction]) -> str:
    """A table with a header: ``path,class,probability``, then ``class_2,probability_2`` and so on."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    header = ["path", "class", "probability"]
    for place in range(2, len(found[0].classes) + 1):
        header += [f"class_{place}", f"probability_{place}"]
    writer.writerow(header)
    for one in found:
        pairs = zip(one.classes, one.probabilities, strict=True)
        writer.writerow([one.path, *(cell for pair in pairs for cell in pair)])
    return text.getvalue()
