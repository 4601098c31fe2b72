"""A rank's device, the process group backend for it, its CPU cores and its random number generators."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distrain.config.schema import Config
from distrain.errors import ConfigError
from distrain.runtime.world import World


def choose_device(config: Config, world: World) -> torch.device:
    """Returns the device that the configuration asks for.

    Raises:
        ConfigError: There is no such device, or fewer of them than ranks on this host.
    """
    configured = config.runtime.device
    if configured == "cpu" or (configured == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("runtime.device", configured, "torch sees no GPU here", ["auto", "cpu"])
    if world.local_size > torch.cuda.device_count():
        raise ConfigError(
            "runtime.device",
            configured,
            f"{world.local_size} ranks on this host share {torch.cuda.device_count()} GPUs; start fewer, or use cpu",
        )
    return torch.device("cuda", world.local_rank)


def choose_backend(config: Config, device: torch.device) -> str:
    """Returns the process group backend for a device.

    Raises:
        ConfigError: The backend doesn't serve the device.
    """
    configured = config.runtime.backend
    if configured == "auto":
        return "nccl" if device.type == "cuda" else "gloo"
    if configured == "nccl" and device.type != "cuda":
        raise ConfigError("runtime.backend", configured, "needs runtime.device=cuda", ["auto", "gloo"])
    return configured


def available_cores() -> int:
    """Number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choose_threads(configured: int | None, world: World, environment: Mapping[str, str] = os.environ) -> int:
    """Number of CPU threads of this rank.

    Args:
        configured: ``runtime.threads``.
        world: This rank's place.
        environment: What the user set there counts: ``MKL_NUM_THREADS``, else ``OMP_NUM_THREADS``, as in torch.

    Returns:
        What is configured, else what the environment says, else this host's cores divided by its number of ranks.
    """
    if configured is not None:
        return configured
    for name in ("MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        # OpenMP takes a list with the numbers of nested levels.
        text = environment.get(name, "").partition(",")[0].strip()
        if text.isdecimal() and int(text) > 0 and not (name == "OMP_NUM_THREADS" and _set_by_torchrun(environment)):
            return int(text)
    return max(1, available_cores() // world.local_size)


def _set_by_torchrun(environment: Mapping[str, str]) -> bool:
    """Whether ``OMP_NUM_THREADS`` is torchrun's and not the user's.

    torchrun sets it to 1 for its workers if it is not set, which wastes most of a machine that has more cores than
    ranks. torchrun is the parent of this process, and Linux keeps the environment that it was started with.
    """
    several = environment.get("LOCAL_WORLD_SIZE", "1") != "1"
    if "TORCHELASTIC_RUN_ID" not in environment or not several or environment["OMP_NUM_THREADS"] != "1":
        return False
    try:
        of_torchrun = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return True
    return not any(variable.startswith(b"OMP_NUM_THREADS=") for variable in of_torchrun.split(b"\0"))


def seed_everything(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's random numbers."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - user code may draw from the global generator
    torch.manual_seed(seed)


@dataclass(frozen=True)
class RandomState:
    """What the next random numbers of Python, NumPy and torch on the CPU depend on."""

    of_python: tuple[Any, ...]
    of_numpy: dict[str, Any]
    of_torch: torch.Tensor

    @classmethod
    def now(cls) -> RandomState:
        """The present state."""
        numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002 - as above
        return cls(random.getstate(), numpy_state, torch.random.get_rng_state())

    def restore(self) -> None:
        """Makes it the present state again."""
        random.setstate(self.of_python)
        np.random.set_state(self.of_numpy)  # noqa: NPY002 - as above
        torch.random.set_rng_state(self.of_torch)

    def draws_equal(self, other: RandomState) -> bool:
        """Whether the same numbers would be drawn next from both states."""
        numpy_equal = self._numpy_key() == other._numpy_key()
        return self.of_python == other.of_python and numpy_equal and torch.equal(self.of_torch, other.of_torch)

    def _numpy_key(self) -> tuple[bytes, object, object]:
        inner = self.of_numpy["state"]
        return np.asarray(inner["key"]).tobytes(), inner["pos"], self.of_numpy["has_gauss"]


def generators(device: torch.device) -> list[torch.Generator]:
    """Returns the generators that computations on a device draw random numbers from.

    Seeding them one by one is faster than ``torch.manual_seed``, which also records its caller's stack as text for each
    kind of device that is not in use; that takes longer than many layers.
    """
    result = [torch.default_generator]
    if device.type == "cuda":
        result.append(torch.cuda.default_generators[device.index])
    return result
