"""``nproc=N`` and the other keys by which a command starts its own ranks; they are no part of a run's configuration."""

from __future__ import annotations

import dataclasses
import os
import re
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from distrain.config.load import load_settings
from distrain.config.setting import setting
from distrain.errors import ConfigError, config_error
from distrain.health.last_line import LAUNCHER
from distrain.runtime.world import World

#: Most ranks per host; a larger number is a slip of the finger, which would bring the machine down.
_MOST_RANKS = 1024
_SEVERAL_RUNS = re.compile(r"-m|--multirun|\+{0,2}hydra\.mode=.*multirun.*", re.IGNORECASE)
_SETTING = re.compile(r"\+{0,2}(?P<key>\w+)=(?P<value>.*)", re.DOTALL)


@dataclass
class LaunchSettings:
    """Keys that say which ranks a command starts on this host, and how the hosts of a job meet."""

    nproc: int | str = setting(
        f"Ranks to start on this host: a number up to {_MOST_RANKS}, or gpu: one for each GPU.",
        at_least=1,
        at_most=_MOST_RANKS,
        default=1,
    )
    nnodes: int | str = setting(
        "Hosts of the job; start the same command on each. MIN:MAX: hosts may join and leave.", at_least=1, default=1
    )
    rdzv_endpoint: str | None = setting(
        "Where the hosts meet: HOST:PORT, the same on every host; HOST is one of them.", default=None
    )
    rdzv_id: str = setting(
        "Name of the job, the same on every host; jobs with different names can use the same port.", default="distrain"
    )
    node_rank: int | None = setting(
        "Number of this host, from 0; the host of rdzv_endpoint is 0. null: the hosts agree on it.",
        at_least=0,
        default=None,
    )
    local_addr: str | None = setting(
        "Name or address by which the other hosts reach this one; null: what its own name resolves to.", default=None
    )
    max_restarts: int = setting(
        "How often all ranks are started again after one has failed; they resume from the newest checkpoint.",
        at_least=0,
        default=0,
    )

    @property
    def nodes(self) -> tuple[int, int]:
        """The smallest and the largest number of hosts."""
        first, _, last = str(self.nnodes).partition(":")
        return int(first), int(last or first)

    def ranks_per_host(self) -> int:
        """The number of ranks to start here.

        Raises:
            ConfigError: ``nproc=gpu``, and torch finds none.
        """
        if self.nproc != "gpu":
            return int(self.nproc)
        import torch  # which a number need not wait for

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise ConfigError("nproc", "gpu", "torch finds no GPU here; type a number")
        return count

    def first_world(self) -> World:
        """Rank 0's place among the fewest ranks that will be started, to check a configuration before that."""
        ranks = self.ranks_per_host()
        return World(0, ranks * self.nodes[0], 0, ranks, socket.gethostname())

    @property
    def starts_ranks(self) -> bool:
        """Whether the command starts ranks, rather than being the only one itself."""
        return self.nproc != 1 or self.nodes != (1, 1) or self.max_restarts > 0


def docs() -> dict[str, str]:
    """The meaning of each key."""
    return {spec.name: spec.metadata["doc"] for spec in dataclasses.fields(LaunchSettings)}


def pop(arguments: list[str]) -> list[str]:
    """Removes the keys of :class:`LaunchSettings`, which Hydra doesn't know, from a command line and returns them."""
    names = docs()
    found = [argument for argument in arguments if _key(argument) in names]
    arguments[:] = [argument for argument in arguments if argument not in found]
    return found


def is_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether distrain's own launcher started this process as a rank."""
    return LAUNCHER in environment and "RANK" in environment


def check(given: Iterable[str], arguments: Iterable[str], environment: Mapping[str, str]) -> LaunchSettings | None:
    """Checks what :func:`pop` returned.

    Args:
        given: The arguments with keys of :class:`LaunchSettings`.
        arguments: The rest of the command line.
        environment: The environment variables, which say whether this process is a rank already.

    Returns:
        The settings; ``None`` if the command starts no ranks.

    Raises:
        ConfigError: A value is wrong, or ranks can't be started from here.
    """
    given = list(given)
    if not given:
        return None
    values: dict[str, Any] = {}
    for argument in given:
        key, value = _key(argument), argument.partition("=")[2]
        if key in values:
            raise ConfigError(key, value, "is given twice")
        if "${" in value:
            raise ConfigError(key, value, "can't refer to other keys")
        values[key] = _plain(key, value)
    settings = load_settings(LaunchSettings, DictConfig(values))
    _check_values(settings)
    name = given[0].partition("=")[0]
    if not settings.starts_ranks:
        return None
    if "TORCHELASTIC_RUN_ID" in environment:
        raise config_error(name, "torchrun has started this process, as one of its ranks; use one of the two")
    one_host = settings.nodes == (1, 1)
    started = environment.get("WORLD_SIZE", "1")
    # Operators of clusters set it for one process per host, whose agent sets it anew for each rank.
    if one_host and started != "1":
        problem = f"this process is one of {started} ranks already (WORLD_SIZE={started}); leave one of the two out"
        raise config_error(name, problem)
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1" and one_host and "SLURM_STEP_ID" in environment:
        problem = (
            f"srun has started {tasks} tasks, which are ranks already; leave {name} out, or give one task per node"
        )
        raise config_error(name, f"{problem} nnodes and rdzv_endpoint")
    if any(_SEVERAL_RUNS.fullmatch(argument) for argument in arguments):
        problem = "does not go with --multirun, whose runs are all in one process; `sweep` starts ranks for each run"
        raise config_error(name, problem)
    return settings


def defaults() -> DictConfig:
    """All keys with their defaults, for help."""
    return OmegaConf.structured(LaunchSettings)  # type: ignore[no-any-return]


def _key(argument: str) -> str:
    found = _SETTING.fullmatch(argument)
    return found["key"] if found is not None else ""


def _plain(key: str, value: str) -> int | str | None:
    """The value of a key: a number where it is one, ``None`` for ``null``; quotes around it are removed."""
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return value[1:-1]
    if value == "null":
        return None
    is_number = re.fullmatch(r"-?\d{1,9}", value) is not None
    return int(value) if is_number and key != "rdzv_id" else value


def _check_values(settings: LaunchSettings) -> None:
    if isinstance(settings.nproc, str) and settings.nproc != "gpu":
        raise ConfigError("nproc", settings.nproc, "must be a whole number, or gpu: one rank for each GPU")
    if not re.fullmatch(r"[1-9]\d{0,5}(:[1-9]\d{0,5})?", str(settings.nnodes)):
        raise ConfigError("nnodes", settings.nnodes, "must be a whole number, or MIN:MAX, from 1 on")
    least, most = settings.nodes
    if least > most:
        raise ConfigError(
            "nnodes", settings.nnodes, f"the smallest number, {least}, is larger than the largest, {most}"
        )
    endpoint = settings.rdzv_endpoint
    if most > 1 and endpoint is None:
        problem = "several hosts need a place to meet; type rdzv_endpoint=HOST:PORT, the same on every host"
        raise ConfigError("nnodes", settings.nnodes, problem)
    for key in ("rdzv_endpoint", "node_rank", "local_addr"):
        if most == 1 and getattr(settings, key) is not None:
            raise ConfigError(key, getattr(settings, key), "is for jobs on several hosts; type nnodes=N too")
    if endpoint is not None:
        host, _, port = endpoint.rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port[:6]) < 1 << 16):
            raise ConfigError("rdzv_endpoint", endpoint, "must be HOST:PORT, with a port from 1 to 65535")
    if settings.node_rank is not None and (least != most or settings.node_rank >= most):
        problem = (
            "hosts that may join and leave have no fixed numbers" if least != most else f"must be less than {most}"
        )
        raise ConfigError("node_rank", settings.node_rank, problem)
