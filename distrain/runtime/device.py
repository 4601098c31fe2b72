"""A rank's device, the process group backend for it, its CPU cores and its random number generators."""

from __future__ import annotations

import os
import random

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


def seed_everything(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's random numbers."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - user code may draw from the global generator
    torch.manual_seed(seed)


def generators(device: torch.device) -> list[torch.Generator]:
    """Returns the generators that computations on a device draw random numbers from.

    Seeding them one by one is faster than ``torch.manual_seed``, which also records its caller's stack as text for each
    kind of device that is not in use; that takes longer than many layers.
    """
    result = [torch.default_generator]
    if device.type == "cuda":
        result.append(torch.cuda.default_generators[device.index])
    return result
