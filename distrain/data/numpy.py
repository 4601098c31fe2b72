"""data=numpy: images and targets in an .npz file or in a folder of .npy files."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import override

from distrain.config.groups import DataConfig
from distrain.config.registry import register
from distrain.config.setting import setting
from distrain.data.array_files import ArrayFiles, ArrayHeader, ZipOfArrays, open_arrays
from distrain.data.array_images import USUAL_CHANNELS, first_not_finite, float_statistics
from distrain.data.array_names import assign_roles
from distrain.data.array_targets import ArrayTargets, read_targets
from distrain.data.base import (
    TARGETS,
    DataSource,
    DataSpec,
    Images,
    Splits,
    assemble,
    check_shared_keys,
    hold_out_test,
    refusing_unreadable,
)
from distrain.data.image_tree import PART_NAMES
from distrain.errors import ConfigError

_LAYOUTS = {"nchw": "[N, C, H, W]", "nhwc": "[N, H, W, C]"}
_UINT16_WHITE = (1 << 16) - 1
Array = npt.NDArray[Any]


@dataclass
class NumpyConfig(DataConfig):
    """Keys of ``data=numpy``."""

    arrays: dict[str, str] = setting(
        "Names of the arrays where they are not the usual ones, by role: train_images, train_labels, val_images, "
        "val_labels, test_images, test_labels.",
        default_factory=dict,
    )
    layout: str = setting(
        "Order of the dimensions of images: auto, where the number of channels tells; nchw or nhwc.",
        choices=("auto", *_LAYOUTS),
    )
    target: str | None = setting(
        "Kind of the targets; null: by their shape and type.",
        choices=(None, *TARGETS),
    )
    classes: list[str] | None = setting("Names of the classes, or of the numbers; null: 0, 1, …")
    test_fraction: float = setting(
        "Share of the images used for testing if there are no test arrays.", above=0, below=1
    )


@register("data", "numpy", NumpyConfig)
class NumpyData(DataSource):
    """Arrays ``x_train``, ``y_train`` and perhaps ``x_val``, ``y_val``, ``x_test``, ``y_test``; or other usual names.

    Pixels are uint8. Floating-point images reach the model as they are, unless ``mean`` and ``std`` are given. uint16
    becomes float32 in [0, 1], 65535 being 1.

    Images in .npy files that need more memory than ``memory_limit_mb`` stay in the files, which all ranks of a host
    share.
    """

    @classmethod
    @override
    def changes_for_classes(cls, config: Any, spec: DataSpec) -> dict[str, Any]:
        return {"classes": list(spec.classes), "target": spec.target}

    def __init__(self, config: NumpyConfig) -> None:
        self._config = config
        if config.root is None:
            raise ConfigError("data.root", None, "needs the .npz file, or the folder of .npy files")
        self._root = Path(config.root)

    @functools.cached_property
    def _files(self) -> ArrayFiles:
        return open_arrays(self._root)

    @functools.cached_property
    def _roles(self) -> dict[str, str]:
        return assign_roles(self._files.headers, self._config.arrays)

    @functools.cached_property
    def _parts(self) -> list[str]:
        return [part for part in PART_NAMES if f"{part}_images" in self._roles]

    def describe(self) -> DataSpec:
        """Looks at the headers of the images and reads the targets.

        Raises:
            ConfigError: There are no such arrays, or their shape, type or values can't be used.
        """
        with refusing_unreadable(self._root):
            return check_shared_keys(self._config, self._spec)

    def load(self) -> Splits:
        """Reads the images, or maps them to memory.

        Raises:
            ConfigError: As :meth:`describe`; or images are NaN or infinite, or don't fit the memory limit.
        """
        spec, targets = self.describe(), self._targets.by_part
        with refusing_unreadable(self._root):
            images = {part: self._images(part) for part in self._parts}
        rows = {part: torch.arange(len(images[part])) if self._exceeds_limit else None for part in images}
        splits = {part: Images(images[part], targets[part], rows[part]) for part in images}
        config, train, test = self._config, splits["train"], splits.get("test")
        notes = [self._targets.summary(), *self._unused()]
        if spec.dtype == "float" and config.mean is None and config.std is None:
            notes.append(self._advice(images["train"]))
        if test is None:
            keep, held_out = hold_out_test(len(train), config.test_fraction, config.split_seed)
            train, test = train.subset(keep), train.subset(held_out)
        result = assemble(config, spec, train, test, val=splits.get("val"))
        sizes = f"{len(result.train)} samples to train on, {len(result.val)} for validation, {len(result.test)} to test"
        return dataclasses.replace(result, notes=(sizes, *notes), fingerprint=self._fingerprint())

    @functools.cached_property
    def _targets(self) -> ArrayTargets:
        names = {part: self._roles[f"{part}_labels"] for part in self._parts}
        return read_targets(self._files, names, self._config.target, self._config.classes)

    @functools.cached_property
    def _spec(self) -> DataSpec:
        """Shape and classes."""
        train, first = self._header("train_images"), self._roles["train_images"]
        channels, height, width = shape = self._shape("train")
        for part in self._parts:
            header, name = self._header(f"{part}_images"), self._roles[f"{part}_images"]
            if self._shape(part) != shape:
                problem = f"{name} has images {list(self._shape(part))}, and {first} {list(shape)}"
                raise ConfigError("data.root", self._root, problem)
            if header.dtype.kind != train.dtype.kind:
                raise ConfigError("data.root", self._root, f"{name} is {header.dtype}, and {first} {train.dtype}")
            count, targets = len(self._targets.by_part[part]), self._roles[f"{part}_labels"]
            if header.shape[0] != count:
                problem = f"{name} has {header.shape[0]} images, and {targets} {count} targets"
                raise ConfigError("data.root", self._root, problem)
            size = list(self._targets.by_part[part].shape[1:])
            if self._targets.kind == "mask" and size != [height, width]:
                problem = f"{targets} has masks {size}, and {name} has images {[height, width]}"
                raise ConfigError("data.root", self._root, problem)
        dtype = "uint8" if train.dtype == np.uint8 else "float"
        return DataSpec(channels, height, width, self._targets.classes, dtype, self._targets.kind)

    def _unused(self) -> list[str]:
        unused = [name for name in self._files.headers if name not in self._roles.values()]
        return [f"arrays that are not used: {', '.join(unused)}"] if unused else []

    def _advice(self, images: Tensor) -> str:
        """How to normalise floating-point images."""
        mean, std = (",".join(f"{value:.4g}" for value in values) for values in float_statistics(images))
        name = self._roles["train_images"]
        return f"{name} is not normalised; data.mean=[{mean}] data.std=[{std}] give it mean 0 and standard deviation 1"

    def _header(self, role: str) -> ArrayHeader:
        return self._files.headers[self._roles[role]]

    def _layout(self, part: str) -> str:
        """The order of the dimensions of a part's images, ``nhw`` for [N, H, W]."""
        shape, name = list(self._header(f"{part}_images").shape), self._roles[f"{part}_images"]
        if len(shape) == 3:
            return "nhw"
        if len(shape) != 4:
            hint = "; x.reshape(-1, 28, 28), for example, makes images of rows of numbers" if len(shape) == 2 else ""
            problem = f"{name} is {shape}; images [N, H, W], [N, C, H, W] or [N, H, W, C] are needed{hint}"
            raise ConfigError("data.root", self._root, problem)
        if self._config.layout != "auto":
            return self._config.layout
        first, last = shape[1] in USUAL_CHANNELS, shape[3] in USUAL_CHANNELS
        if first == last:
            problem = f"{name} is {shape}, which may be {_LAYOUTS['nchw']} or {_LAYOUTS['nhwc']}"
            raise ConfigError("data.layout", "auto", problem, _LAYOUTS)
        return "nchw" if first else "nhwc"

    def _shape(self, part: str) -> tuple[int, int, int]:
        """Channels, height and width of a part's images."""
        header, layout, name = self._header(f"{part}_images"), self._layout(part), self._roles[f"{part}_images"]
        if 0 in header.shape:
            raise ConfigError("data.root", self._root, f"{name} is {list(header.shape)}: it holds nothing")
        if header.dtype not in (np.uint8, np.uint16) and header.dtype.kind != "f":
            problem = f"{name} is {header.dtype}; images are uint8 (0 to 255), uint16 or floating point"
            raise ConfigError("data.root", self._root, f"{problem}: np.save(…, x.astype(np.uint8)), for example")
        sizes = dict(zip(layout, header.shape, strict=True))
        return sizes.get("c", 1), sizes["h"], sizes["w"]

    def _images(self, part: str) -> Tensor:
        """Images [N, C, H, W]: uint8 or floating point in memory, or a map of the file if they exceed the limit."""
        name, layout, header = self._roles[f"{part}_images"], self._layout(part), self._header(f"{part}_images")
        array = self._read_images(name, header)
        mapped = isinstance(array, np.memmap)
        if header.dtype == np.uint16:
            array = array.astype(np.float32) / np.float32(_UINT16_WHITE)
        elif not mapped:
            array = np.ascontiguousarray(array.astype(header.dtype.newbyteorder("="), copy=False))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a map is meant to be read-only
            images = torch.from_numpy(array)
        if layout == "nhw":
            images = images.unsqueeze(1)
        elif layout == "nhwc":
            images = images.permute(0, 3, 1, 2) if mapped else images.permute(0, 3, 1, 2).contiguous()
        if images.is_floating_point() and (row := first_not_finite(images)) is not None:
            raise ConfigError("data.root", self._root, f"{name}[{row}] has pixels that are NaN or infinite")
        return images

    def _read_images(self, name: str, header: ArrayHeader) -> Array:
        """An array in memory, or as a map if the images exceed the limit."""
        if not self._exceeds_limit:
            array = self._files.read(name)
            return np.array(array) if isinstance(array, np.memmap) else array
        if isinstance(self._files, ZipOfArrays):
            way = f"unzip {self._root.name} -d FOLDER, and name that folder of .npy files, which stay on disk"
        elif header.dtype == np.uint16 or not header.dtype.isnative:
            way = f"they would stay on disk if {name} were uint8 or float32 of this machine's byte order"
        else:
            return self._files.read(name)
        problem = f"the images need {self._image_bytes / 2**20:,.0f} MiB; {way}"
        raise ConfigError("data.memory_limit_mb", self._config.memory_limit_mb, problem)

    @property
    def _image_bytes(self) -> int:
        headers = [self._header(f"{part}_images") for part in self._parts]
        # uint16 becomes float32.
        return sum(header.nbytes * (2 if header.dtype == np.uint16 else 1) for header in headers)

    @property
    def _exceeds_limit(self) -> bool:
        return self._image_bytes > self._config.memory_limit_mb << 20

    def _fingerprint(self) -> str:
        """Differs if the arrays differ, as far as that can be told without reading all of them."""
        digest = hashlib.blake2b(digest_size=16)
        for role, name in sorted(self._roles.items()):
            header = self._files.headers[name]
            content = f"{role} {header.dtype} {header.shape} {self._files.fingerprint(name)} "
            digest.update(content.encode())
        for part, targets in self._targets.by_part.items():
            digest.update(part.encode() + np.ascontiguousarray(targets.numpy()).tobytes())
        return digest.hexdigest()
