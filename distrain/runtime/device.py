"""A rank's device, the process group backend for it, its CPU cores and its random number generators."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from distrain import rng
from distrain.config.schema import Config
from distrain.errors import ConfigError
from distrain.runtime.world import World

#: The macOS, as major and minor version, from which on torch has bf16 on Apple's GPUs.
_BF16_MACOS = (14, 0)
#: torch's name for Apple's GPUs.
MPS = "mps"


def is_mps(device: torch.device) -> bool:
    """Whether this is an Apple GPU."""
    return device.type == MPS


def float64_device(device: torch.device) -> torch.device:
    """Where float64 numbers about this device's work are kept: there, but on the CPU if it is an Apple GPU.

    Those GPUs have no float64, and they work for one rank only, so these numbers need not be sent from there.
    """
    return torch.device("cpu") if is_mps(device) else device


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all the work that was queued for it."""
    if is_mps(device):
        torch.mps.synchronize()
    elif device.type == "cuda":
        torch.cuda.synchronize(device)


def choose_device(config: Config, world: World) -> torch.device:
    """Returns the device that the configuration asks for.

    Raises:
        ConfigError: There is no such device, fewer of them than ranks on this host, or it can't do what the rest of the
            configuration asks for.
    """
    configured = config.runtime.device
    if configured == MPS:
        _check_mps(config, world)
        return torch.device(MPS)
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


def _check_mps(config: Config, world: World) -> None:
    """Refuses what torch can't do on an Apple GPU.

    Raises:
        ConfigError: One line that says what, why, and what to type.
    """
    others = ["auto", "cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if not torch.backends.mps.is_built():
        problem = "this torch is built without MPS, by which torch uses Apple's GPUs on macOS"
        raise ConfigError("runtime.device", MPS, problem, others)
    if not torch.backends.mps.is_available():
        problem = "torch can't use it here: it needs an Apple GPU, and a macOS that is new enough for this torch"
        raise ConfigError("runtime.device", MPS, problem, others)
    if world.size > 1:
        problem = f"torch has no backend by which ranks on Apple GPUs communicate, and {world.size} ranks were started"
        raise ConfigError("runtime.device", MPS, f"{problem}; start one (strategy=single), or use cpu", ["auto", "cpu"])
    trainer = config.trainer
    if trainer.precision == "fp64":
        raise ConfigError("trainer.precision", "fp64", f"an Apple GPU (device={MPS}) has no float64; device=cpu has")
    if trainer.compile:
        problem = f"torch compiles for an Apple GPU (device={MPS}) only as an experiment"
        raise ConfigError("trainer.compile", trainer.compile, problem, ["false"])
    key = "lowest_precision" if trainer.precision == "auto" else "precision"
    if getattr(trainer, key) == "bf16" and not torch.backends.mps.is_macos_or_newer(*_BF16_MACOS):
        problem = f"needs macOS {_BF16_MACOS[0]} or newer on an Apple GPU (device={MPS}); fp32 does not"
        raise ConfigError(f"trainer.{key}", "bf16", problem)


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
    """What the next random numbers of Python, NumPy, torch on the CPU, and torch on an Apple GPU depend on.

    Attributes:
        of_python: The state of Python's generator.
        of_numpy: That of NumPy's global one.
        of_torch: That of torch's on the CPU.
        of_mps: That of torch's on the Apple GPU; ``None`` where there is none.
    """

    of_python: tuple[Any, ...]
    of_numpy: dict[str, Any]
    of_torch: torch.Tensor
    of_mps: torch.Tensor | None = None

    @classmethod
    def now(cls) -> RandomState:
        """The present state."""
        numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002 - as above
        of_mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
        return cls(random.getstate(), numpy_state, torch.random.get_rng_state(), of_mps)

    def restore(self) -> None:
        """Makes it the present state again."""
        random.setstate(self.of_python)
        np.random.set_state(self.of_numpy)  # noqa: NPY002 - as above
        torch.random.set_rng_state(self.of_torch)
        if self.of_mps is not None:
            torch.mps.set_rng_state(self.of_mps)

    def draws_equal(self, other: RandomState) -> bool:
        """Whether the same numbers would be drawn next from both states, on the CPU."""
        numpy_equal = self._numpy_key() == other._numpy_key()
        return self.of_python == other.of_python and numpy_equal and torch.equal(self.of_torch, other.of_torch)

    def _numpy_key(self) -> tuple[bytes, object, object]:
        inner = self.of_numpy["state"]
        return np.asarray(inner["key"]).tobytes(), inner["pos"], self.of_numpy["has_gauss"]


class Seedable(Protocol):
    """What can be seeded: a generator, or the module ``torch.mps`` for the only one of an Apple GPU."""

    def manual_seed(self, seed: int, /) -> object:
        """Makes the next random numbers depend on this seed alone."""


def generators(device: torch.device) -> list[Seedable]:
    """Returns the generators that computations on a device draw random numbers from.

    Seeding them one by one is faster than ``torch.manual_seed``, which also records its caller's stack as text for each
    kind of device that is not in use; that takes longer than many layers.
    """
    result: list[Seedable] = [torch.default_generator]
    if is_mps(device):
        result.append(torch.mps)
    if device.type == "cuda":
        result.append(torch.cuda.default_generators[device.index])
    return result


class StepGenerators:
    """A device's generators, whose numbers in a step depend on (seed, step, shard) alone, so that none need be saved.

    Args:
        seed: The run's.
        device: Where the model is.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed, self._generators = seed, generators(device)

    def begin_step(self, step: int, shard: int) -> None:
        """Seeds them for a step of the rank that has this shard of each batch."""
        for generator in self._generators:
            generator.manual_seed(rng.step_seed(self._seed, step, shard))
