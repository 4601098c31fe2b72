"""The tensors of the run that all others are compared with, on disk, and the distances of others from them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distrain.errors import config_error

_SUFFIX = ".safetensors"
#: The norm of a difference, and that of the reference.
Distance = tuple[float, float]


class Reference:
    """Named tensors of each step of the serial run.

    Args:
        folder: Which all ranks see.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, step: int, kind: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps the tensors of a step."""
        self._folder.mkdir(parents=True, exist_ok=True)
        # Tied parameters share memory, which the format doesn't take.
        copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        save_file(copies, self._path(step, kind))

    def load(self, step: int, kind: str) -> dict[str, Tensor]:
        """The tensors of a step; empty if the serial run had none of this kind in it.

        Raises:
            ConfigError: This host doesn't see what the serial run has written.
        """
        path = self._path(step, kind)
        if not path.exists():
            if next(self._folder.glob(f"*{_SUFFIX}"), None) is not None:
                return {}
            problem = f"this host can't read {path}, which rank 0 has written; name a folder that all hosts share"
            raise config_error("folder", problem)
        return load_file(path)

    def distances(self, step: int, kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Distance]:
        """How far each tensor is from that of the serial run; infinitely, if that run has none of this name."""
        expected = self.load(step, kind)
        return {
            name: distance(tensor, expected[name]) if name in expected else (math.inf, 0.0)
            for name, tensor in tensors.items()
        }

    def _path(self, step: int, kind: str) -> Path:
        return self._folder / f"{kind}_{step:08d}{_SUFFIX}"


def norm(tensor: Tensor) -> float:
    """Euclidean norm, in double precision."""
    return float(tensor.detach().cpu().double().norm())


def distance(tensor: Tensor, expected: Tensor) -> Distance:
    """The norm of the difference, infinite where a shape differs or a number is not finite in one of them alone."""
    mine, theirs = tensor.detach().cpu().double(), expected.double()
    if mine.shape != theirs.shape:
        return math.inf, norm(theirs)
    difference = float((mine - theirs).norm())
    if not math.isfinite(difference):
        difference = 0.0 if mine.equal(theirs) else math.inf
    return difference, float(theirs.norm())


def row_hashes(tensor: Tensor) -> list[str]:
    """A hash of the bits of each row, so that samples can be compared without keeping them."""
    return [tensor_hash(row) for row in tensor.detach().cpu()]


def tensor_hash(tensor: Tensor) -> str:
    """A hash of a tensor's bits."""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.blake2b(flat.numpy().data, digest_size=8).hexdigest()
