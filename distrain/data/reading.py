"""Reads samples one at a time: what a reader is, and how a batch is made of its samples."""

from __future__ import annotations

import random
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distrain.data.base import IGNORED, DataSpec
from distrain.data.batch import Targets
from distrain.data.sampler import Blocks
from distrain.errors import described


class ItemReader(ABC):
    """Reads one sample at a time, in any order. It is pickled once for each worker process.

    What can't be pickled (an open file, a connection) is opened at the first read of each process. Random numbers of
    torch, NumPy and Python may be drawn while a sample is read: they then depend on (seed, epoch, sample) alone.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def __getitem__(self, row: int) -> tuple[Tensor, Targets | None]:
        """Reads a sample.

        Returns:
            The image [C, H, W], and the sample's target, without the dimension of samples; ``None`` where the split
            holds all targets already.
        """

    def blocks(self) -> Blocks | None:
        """Which samples lie together, in one file for example, and are better read one soon after the other.

        Returns:
            The block of each sample; ``None`` if samples may as well be read in any order.
        """
        return None

    def name(self, row: int) -> str:
        """What a message calls a sample; for example the path of its file."""
        return f"sample {row}"


@dataclass(frozen=True)
class CheckedReader:
    """A reader, and what its samples must be.

    Attributes:
        reader: Reads them.
        spec: Their shape, kind of target and classes.
        dtype: Their type. Floating-point images of another floating-point type are converted to it.
    """

    reader: ItemReader
    spec: DataSpec
    dtype: torch.dtype

    def read(self, row: int) -> tuple[Tensor, Targets | None]:
        """Reads a sample.

        Raises:
            ValueError: It is of another shape or type, or its target is out of range.
        """
        image, target = self.reader[row]
        spec = self.spec
        expected = (spec.channels, spec.height, spec.width)
        if tuple(image.shape) != expected:
            raise ValueError(f"the image is {list(image.shape)}, and others are {list(expected)}")
        if image.dtype != self.dtype:
            if not (image.is_floating_point() and self.dtype.is_floating_point):
                raise ValueError(f"the image is {_short(image.dtype)}, and others are {_short(self.dtype)}")
            image = image.to(self.dtype)
        return image, None if target is None else checked_target(spec, target)


def checked_target(spec: DataSpec, target: Tensor) -> Tensor:
    """The target of one sample in the type that ``spec.target`` says.

    Raises:
        ValueError: It is of another shape, out of range or not finite.
    """
    size = len(spec.classes)
    shapes = {"class": (), "labels": (size,), "numbers": (size,), "mask": (spec.height, spec.width)}
    if tuple(target.shape) != shapes[spec.target]:
        needed = {
            "class": "the number of a class",
            "labels": f"0 or 1 for each of {size} classes",
            "numbers": f"{size} numbers",
            "mask": f"a mask of {spec.height}x{spec.width} pixels",
        }
        found = f"of shape {list(target.shape)}" if target.dim() else "a single number"
        raise ValueError(f"the target is {found}; {needed[spec.target]} is needed (data.target={spec.target})")
    if spec.target == "numbers":
        if not bool(target.isfinite().all()):
            raise ValueError("the target is NaN or infinite")
        return target.to(torch.float32)
    if target.is_floating_point() and not bool((target == target.round()).all()):
        raise ValueError(f"the target is no whole number: {target.flatten()[:5].tolist()}")
    low, high = (int(target.min()), int(target.max())) if target.numel() else (0, 0)
    if spec.target == "class":
        if not 0 <= low < size:
            raise ValueError(f"the class is {low}; the {size} classes are numbered from 0 to {size - 1}")
        return target.to(torch.int64)
    if spec.target == "labels":
        if not 0 <= low <= high <= 1:
            raise ValueError(f"the target has values from {low} to {high}; each label is 0 or 1")
        return target.to(torch.uint8)
    known = target[target != IGNORED]
    if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < size:
        problem = f"classes are numbered from 0 to {size - 1}, and {IGNORED} stands for unknown"
        raise ValueError(f"the mask has values from {int(known.min())} to {int(known.max())}; {problem}")
    return target.to(torch.uint8)


@dataclass(frozen=True, slots=True)
class Request:
    """Samples that are read together.

    Attributes:
        reader: Number of the reader.
        rows: Their numbers for the reader.
        seeds: For each sample what its random numbers depend on, 64 bits.
    """

    reader: int
    rows: Sequence[int]
    seeds: Sequence[int]


@dataclass(frozen=True)
class Failure:
    """Why a sample can't be read.

    Attributes:
        line: In one line.
        stack: Python's traceback.
    """

    line: str
    stack: str


#: Images [n, C, H, W] and their targets.
Samples = tuple[Tensor, Targets]


def read_samples(
    readers: Sequence[CheckedReader], request: Request, begin: Callable[[int], object] = lambda row: None
) -> Samples | Failure:
    """Reads the samples of a request; changes the state of the global random generators.

    Args:
        readers: All readers.
        request: What to read.
        begin: Called before each sample with its number.
    """
    source = readers[request.reader]
    images, targets = [], []
    for row, seed in zip(request.rows, request.seeds, strict=True):
        begin(row)
        _seed(seed)
        try:
            image, target = source.read(row)
        except Exception as error:  # a user's reader may raise anything
            return Failure(f"{source.reader.name(row)} can't be read {described(error)}", traceback.format_exc())
        images.append(image)
        targets.append(target)
    shape = (source.spec.channels, source.spec.height, source.spec.width)
    stacked = torch.stack(images) if images else torch.empty((0, *shape), dtype=source.dtype)
    return stacked, _stacked(source.spec, targets)


def _stacked(spec: DataSpec, targets: list[Any]) -> Targets:
    if not targets:
        shapes = {"class": (0,), "mask": (0, spec.height, spec.width)}
        types = {"class": torch.int64, "numbers": torch.float32}
        shape = shapes.get(spec.target, (0, len(spec.classes)))
        return torch.empty(shape, dtype=types.get(spec.target, torch.uint8))
    return None if targets[0] is None else torch.stack(targets)


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would also note it for GPUs, which takes longer
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002 - user code may draw from the global generator
    random.seed(seed)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
