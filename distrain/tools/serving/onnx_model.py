"""Models in ONNX files, run by ONNX Runtime. Such a file holds numbers and known operators, and no code."""

from __future__ import annotations

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import override

from distrain.data.augmentation.resize import resize_centre
from distrain.data.decode import LARGEST_PIXELS
from distrain.errors import ConfigError, first_line
from distrain.files.untrusted import UnreadableFile, open_regular
from distrain.tools.exporting.program import INPUT, INSIDE
from distrain.tools.serving.model import About, Answer, Pixels, ServedModel, Source

#: Larger files are refused, in bytes; a file of ONNX can't be larger.
_MOST_BYTES = 1 << 31
#: Results that are understood, of those that :meth:`distrain.tasks.base.Task.named_results` gives.
_PROBABILITIES, _CLASS, _LABELS, _NUMBERS = "probabilities", "class", "labels", "numbers"
_FROM = "serve needs a file of: distrain export format=onnx"


class OnnxFile(Source):
    """An ONNX file of ``distrain export format=onnx``.

    Args:
        path: The file.
        threads: CPU threads of the runtime.
    """

    def __init__(self, path: Path, threads: int) -> None:
        self._path, self._threads = path, threads

    @override
    def state(self) -> Hashable:
        found = self._path.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns

    @override
    def newest(self) -> Hashable:
        return self.state()

    @override
    def load(self) -> ServedModel:
        return OnnxModel(self._path, self._threads)


class OnnxModel(ServedModel):
    """The model in an ONNX file.

    Args:
        path: The file.
        threads: CPU threads of the runtime.

    Raises:
        ConfigError: ONNX Runtime is missing, or the file can't be used.
    """

    def __init__(self, path: Path, threads: int) -> None:
        self._session = _open(path, threads)
        try:
            self.about, self._share = self._describe(path.name)
        except (KeyError, TypeError, ValueError) as error:
            problem = f"does not say how it is used ({type(error).__name__}: {error}); {_FROM}"
            raise ConfigError("run", path, problem) from error
        self._outputs = [output.name for output in self._session.get_outputs()]

    def _describe(self, name: str) -> tuple[About, float]:
        """What the file says of itself, checked; and the share of each side of an image that the model sees."""
        about: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        if about["preprocess"] != INSIDE:
            raise ValueError(f"preprocess={about['preprocess']}; it must be {INSIDE}")
        classes = [str(entry) for entry in json.loads(about["classes"])]
        channels, height, width = self._shape = _sizes(about["input_shape"])
        decoded = _sizes(about["decoded_shape"]) if "decoded_shape" in about else self._shape
        share = float(json.loads(about.get("eval_crop", "1")))
        (entry,) = self._session.get_inputs()
        if (entry.name, entry.type, entry.shape[1:]) != (INPUT, "tensor(uint8)", [channels, height, width]):
            raise ValueError(f"takes {entry.name}, {entry.type} {entry.shape}; it must be uint8 of input_shape")
        if decoded[0] != channels or channels not in (1, 3) or not 0 < share <= 1:
            raise ValueError(f"decoded_shape {decoded}, eval_crop {share}")
        self._decoded = {output.name: output.shape[1:] for output in self._session.get_outputs()}
        main = self._decoded.get(_PROBABILITIES, self._decoded.get(_NUMBERS))
        if main != [len(classes)]:
            raise ValueError(f"returns {self._decoded}; it must be a probability or number for each of {len(classes)}")
        largest = len(classes) if _CLASS in self._decoded else 1
        step = int(about["step"])
        return About(name, step, about["model"], about["task"], tuple(classes), decoded, largest), share

    @override
    def answer(self, pixels: Pixels, top: int) -> list[Answer | None]:
        _, height, width = self._shape
        shown = resize_centre(torch.from_numpy(pixels), self._share, height, width).contiguous().numpy()
        results = dict(zip(self._outputs, self._session.run(self._outputs, {INPUT: shown}), strict=True))
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


def _open(path: Path, threads: int) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        problem = "needs ONNX Runtime; run pip install 'distrain[serve,onnx]'"
        raise ConfigError("run", path, problem) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that wait for work by computing would take the cores from those that decode images.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        with open_regular(path) as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ConfigError("run", path, f"has more than {_MOST_BYTES} bytes")
        # From memory, so that a file which names others for its weights can't have them read.
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except (OSError, UnreadableFile) as error:
        raise ConfigError("run", path, f"can't be read ({error})") from error
    except ConfigError:
        raise
    except Exception as error:  # ONNX Runtime has types of its own for each of its errors
        raise ConfigError("run", path, f"ONNX Runtime can't read it ({first_line(error)}); {_FROM}") from error
