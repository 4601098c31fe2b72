"""Where a rank computes: its device, the backend for it, its cores and its random numbers."""

from __future__ import annotations

import os
import random

import numpy as np
import torch

from distrain.config.schema import Config
from distrain.errors import ConfigError
from distrain.runtime.world import World


def choose_device(config: Config, world: World) -> torch.device:
    """The device the configuration asks for.

    Raises:
        ConfigError: There is no such device, or fewer of them than ranks on this host.
    """
    wanted = config.runtime.device
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("runtime.device", wanted, "torch sees no GPU here", ["auto", "cpu"])
    if world.local_size > torch.cuda.device_count():
        raise ConfigError(
            "runtime.device",
            wanted,
            f"{world.local_size} ranks on this host share {torch.cuda.device_count()} GPUs; start fewer, or use cpu",
        )
    return torch.device("cuda", world.local_rank)


def choose_backend(config: Config, device: torch.device) -> str:
    """The process group backend for a device.

    Raises:
        ConfigError: The backend doesn't serve the device.
    """
    wanted = config.runtime.backend
    if wanted == "auto":
        return "nccl" if device.type == "cuda" else "gloo"
    if wanted == "nccl" and device.type != "cuda":
        raise ConfigError("runtime.backend", wanted, "needs runtime.device=cuda", ["auto", "gloo"])
    return wanted


def available_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def seed_everything(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's random numbers."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - user code may draw from the global generator
    torch.manual_seed(seed)


def generators(device: torch.device) -> list[torch.Generator]:
    """What computing on a device draws its random numbers from.

    For a step to seed: ``torch.manual_seed`` also notes for each kind of device that is not in use who called it, as
    text, which takes longer than many a layer.
    """
    found = [torch.default_generator]
    if device.type == "cuda":
        found.append(torch.cuda.default_generators[device.index])
    return found
