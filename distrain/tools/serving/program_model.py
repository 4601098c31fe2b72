"""Models in files of ``distrain export``, whichever library runs them."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import override

from distrain.data.augmentation.resize import resize_centre
from distrain.data.decode import LARGEST_PIXELS
from distrain.errors import ConfigError
from distrain.files.untrusted import UnreadableFile, open_regular
from distrain.tools.exporting.program import INPUT, INSIDE
from distrain.tools.serving.model import About, Answer, Pixels, ServedModel, Source

#: Larger files are refused, in bytes; a file of ONNX can't be larger.
_MOST_BYTES = 1 << 31
#: Results that are understood, of those that :meth:`distrain.tasks.base.Task.named_results` gives.
_PROBABILITIES, _CLASS, _LABELS, _NUMBERS = "probabilities", "class", "labels", "numbers"
#: What is read, for messages.
FROM = "serve needs a file of: distrain export format=onnx (or torch_export)"


@dataclass(frozen=True)
class Program:
    """What a file holds, ready to run.

    Attributes:
        description: What the file says of itself, by name: text, or other values as JSON.
        inputs: Name, type and sizes without the batch of each input.
        outputs: Sizes of each result without the batch, by name.
        run: Gives the results by name for images uint8 [n, C, H, W].
    """

    description: Mapping[str, str]
    inputs: Sequence[tuple[str, str, list[Any]]]
    outputs: Mapping[str, list[Any]]
    run: Callable[[Pixels], Mapping[str, npt.NDArray[Any]]]


class ProgramFile(Source):
    """A file of ``distrain export``.

    Args:
        path: The file.
        load: Reads a program from the content of the file at a path; raises :class:`ConfigError` if it can't.
    """

    def __init__(self, path: Path, load: Callable[[Path], Program]) -> None:
        self._path, self._load = path, load

    @override
    def state(self) -> Hashable:
        found = self._path.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns

    @override
    def newest(self) -> Hashable:
        return self.state()

    @override
    def load(self) -> ServedModel:
        return ProgramModel(self._path, self._load(self._path))


class ProgramModel(ServedModel):
    """The model that a program computes.

    Args:
        path: Its file.
        program: What the file holds.

    Raises:
        ConfigError: The program is no model of images, or what it says of itself can't be.
    """

    def __init__(self, path: Path, program: Program) -> None:
        self._program = program
        try:
            self.about, self._share = self._describe(path.name)
        except (KeyError, TypeError, ValueError) as error:
            problem = f"does not say how it is used ({type(error).__name__}: {error}); {FROM}"
            raise ConfigError("run", path, problem) from error

    def _describe(self, name: str) -> tuple[About, float]:
        """What the file says of itself, checked; and the share of each side of an image that the model sees."""
        about, outputs = self._program.description, self._program.outputs
        if about["preprocess"] != INSIDE:
            raise ValueError(f"preprocess={about['preprocess']}; it must be {INSIDE}")
        classes = [str(entry) for entry in json.loads(about["classes"])]
        channels, height, width = self._shape = _sizes(about["input_shape"])
        decoded = _sizes(about["decoded_shape"]) if "decoded_shape" in about else self._shape
        share = float(json.loads(about.get("eval_crop", "1")))
        (entry,) = self._program.inputs
        if entry != (INPUT, "uint8", [channels, height, width]):
            raise ValueError(f"takes {entry}; it must be uint8 of input_shape")
        if decoded[0] != channels or channels not in (1, 3) or not 0 < share <= 1:
            raise ValueError(f"decoded_shape {decoded}, eval_crop {share}")
        if outputs.get(_PROBABILITIES, outputs.get(_NUMBERS)) != [len(classes)]:
            raise ValueError(f"returns {outputs}; it must be a probability or number for each of {len(classes)}")
        largest = len(classes) if _CLASS in outputs else 1
        step = int(about["step"])
        return About(name, step, about["model"], about["task"], tuple(classes), decoded, largest), share

    @override
    def answer(self, pixels: Pixels, top: int) -> list[Answer | None]:
        _, height, width = self._shape
        shown = resize_centre(torch.from_numpy(pixels), self._share, height, width).contiguous().numpy()
        results = self._program.run(shown)
        classes = self.about.classes
        rows: list[Answer]
        if _NUMBERS in results:
            rows = [{_NUMBERS: dict(zip(classes, row, strict=True))} for row in results[_NUMBERS].tolist()]
            return _finite(results[_NUMBERS], rows)
        probabilities = results[_PROBABILITIES]
        if _CLASS in results:
            return _finite(probabilities, _ranked(classes, probabilities, top))
        rows = [
            {
                "labels": [name for name, applies in zip(classes, flags, strict=True) if applies],
                "probabilities": dict(zip(classes, values, strict=True)),
            }
            for flags, values in zip(results[_LABELS].tolist(), probabilities.tolist(), strict=True)
        ]
        return _finite(probabilities, rows)


def read(path: Path) -> bytes:
    """The content of a program's file.

    Raises:
        ConfigError: It can't be read, or is too large.
    """
    try:
        with open_regular(path) as file:
            content = file.read(_MOST_BYTES + 1)
    except (OSError, UnreadableFile) as error:
        raise ConfigError("run", path, f"can't be read ({error})") from error
    if len(content) > _MOST_BYTES:
        raise ConfigError("run", path, f"has more than {_MOST_BYTES} bytes")
    return content


def _ranked(classes: tuple[str, ...], probabilities: npt.NDArray[np.float32], top: int) -> list[Answer]:
    """The most probable classes of each image, as :class:`distrain.tasks.classification.Classification` gives them."""
    # Stable, so that the first of equal ones is the class that the model decides for.
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]
    rows: list[Answer] = []
    for places, values in zip(order.tolist(), np.take_along_axis(probabilities, order, 1).tolist(), strict=True):
        ranked = [{"class": classes[place], "probability": value} for place, value in zip(places, values, strict=True)]
        rows.append({**ranked[0], **({"top": ranked} if top > 1 else {})})
    return rows


def _finite(values: npt.NDArray[np.float32], rows: list[Answer]) -> list[Answer | None]:
    return [row if np.isfinite(numbers).all() else None for row, numbers in zip(rows, values, strict=True)]


def _sizes(text: str) -> tuple[int, int, int]:
    sizes = json.loads(text)
    if len(sizes) != 3 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"{text[:100]} is no shape of an image")
    channels, height, width = sizes
    if channels * height * width > 3 * LARGEST_PIXELS:
        raise ValueError(f"{text[:100]} are too many pixels")
    return channels, height, width
