"""Reads the description of a cluster that isn't here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distrain.config.load import load_settings
from distrain.config.setting import setting
from distrain.errors import ConfigError, first_line
from distrain.tools.planning.cluster import Accelerator, Cluster, Link


@dataclass
class LinkSettings:
    """A link in one direction."""

    latency_us: float = setting("Microseconds of a message without content.", at_least=0)
    gbit_per_s: float = setting("Bandwidth in Gbit/s of large messages, in one direction.", above=0)


@dataclass
class DeviceSettings:
    """What the ranks' devices reach in training; a data sheet's figures are seldom reached."""

    tflops: float = setting("Floating-point operations per second that are reached, in 10^12.", above=0)
    gbyte_per_s: float = setting("Bandwidth of its memory in 10^9 bytes per second.", above=0)
    launch_us: float = setting("Microseconds to launch a kernel.", at_least=0, default=5.0)


@dataclass
class ClusterSettings:
    """Keys of a cluster file."""

    hosts: int = setting("Number of hosts.", at_least=1)
    ranks_per_host: int = setting("Ranks on each host, such as its GPUs.", at_least=1)
    between: LinkSettings = field(default_factory=LinkSettings)
    within: LinkSettings = field(default_factory=LinkSettings)
    memory_gb: float | None = setting("Memory of each rank in 10^9 bytes; null: unknown.", above=0, default=None)
    device: DeviceSettings | None = None
    relative_speeds: list[float] = setting(
        "Speed of each host's computation, relative to the fastest one; empty: all are as fast.",
        above=0,
        default_factory=list,
    )
    spread: float = setting(
        "Standard deviation of the time that a rank computes in a step, relative to its mean.",
        at_least=0,
        below=1,
        default=0.0,
    )


def read(path: Path) -> Cluster:
    """Reads a cluster file.

    Args:
        path: A YAML file with the keys of :class:`ClusterSettings`.

    Raises:
        ConfigError: It can't be read, or a key is wrong; the line names file and key.
    """
    try:
        composed = OmegaConf.create(path.read_text())
    except OSError as error:
        raise ConfigError("cluster", path, f"can't be read ({error.strerror or error})") from error
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise ConfigError("cluster", path, f"is not YAML: {first_line(error)}") from error
    if not isinstance(composed, DictConfig):
        raise ConfigError("cluster", path, "has no keys; hosts: 2 is one")
    try:
        settings = load_settings(ClusterSettings, composed)
    except ConfigError as error:
        raise ConfigError("cluster", path, str(error)) from error
    speeds = settings.relative_speeds
    if speeds and len(speeds) != settings.hosts:
        problem = f"relative_speeds has {len(speeds)} numbers for {settings.hosts} hosts"
        raise ConfigError("cluster", path, problem)
    device = settings.device
    return Cluster(
        settings.hosts,
        settings.ranks_per_host,
        _link(settings.within),
        _link(settings.between),
        None if settings.memory_gb is None else 1e9 * settings.memory_gb,
        relative_speeds=tuple(speeds),
        spread=settings.spread,
        accelerator=None
        if device is None
        else Accelerator(1e12 * device.tflops, 1e9 * device.gbyte_per_s, 1e-6 * device.launch_us),
    )


def _link(link: LinkSettings) -> Link:
    return Link.of(1e-6 * link.latency_us, 1e9 / 8 * link.gbit_per_s)
