"""``distrain plan``: predicts what a step takes under each strategy."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distrain.cli.verify import training_config
from distrain.config.schema import CompressionConfig, setting
from distrain.errors import ConfigError, config_error
from distrain.files.terminal import show
from distrain.runtime.world import World
from distrain.tools.launching import slurm
from distrain.tools.launching.launch_keys import LaunchSettings
from distrain.tools.planning import engine
from distrain.tools.planning.plan import FILE, Plan


@dataclass
class PlanSettings:
    """Keys of ``distrain plan``."""

    cluster: str | None = setting(
        "YAML file that describes a cluster; null: the ranks that are started are measured.", path=True
    )
    strategies: list[str] = setting("Strategies to look at.", choices=engine.STRATEGIES)
    rows: int = setting("Configurations to show.", at_least=1)
    folder: str | None = setting(f"Folder for {FILE}; null: outputs/plan/<date>_<time>.", path=True)

    def options(self) -> engine.Options:
        """What is asked of a plan."""
        return engine.Options(Path(self.cluster) if self.cluster else None, tuple(self.strategies))


def run(settings: PlanSettings, keys: Sequence[str]) -> Plan:
    """Makes a plan; rank 0 prints and writes it.

    Args:
        settings: The command's settings.
        keys: Settings of the training.

    Raises:
        ConfigError: A setting is wrong, or the training can't run.
        Failed: A rank failed.
    """
    slurm.set_torchrun_variables(os.environ)
    world = World.from_environment()
    config = training_config(keys)
    made = engine.make_plan(config, world, settings.options(), _compressors(keys, world, settings))
    if world.rank == 0:
        name = settings.folder or f"outputs/plan/{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}"
        folder = Path(name)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = made.write(folder)
        except OSError as error:
            raise ConfigError("folder", name, f"can't be written ({error.strerror or error})") from error
        for line in made.lines(settings.rows):
            show(line)
        show(f"plan: {path}")
    return made


def _compressors(keys: Sequence[str], world: World, settings: PlanSettings) -> Mapping[str, CompressionConfig]:
    """Configurations of the compressors to time; none if there is nobody to send to."""
    if world.size == 1 or "ddp" not in settings.strategies:
        return {}
    others = [key for key in keys if not key.lstrip("+").startswith("compression")]
    return {name: training_config([*others, f"compression={name}"]).compression for name in engine.COMPRESSORS}


def check(settings: PlanSettings, keys: Sequence[str], launch: LaunchSettings) -> None:
    """Refuses what ranks would refuse, before they are started.

    Raises:
        ConfigError: As :func:`run`.
    """
    if launch.max_restarts or launch.nodes[0] != launch.nodes[1]:
        raise config_error("plan", "measures ranks that stay; leave max_restarts and nnodes=MIN:MAX out")
    engine.check(training_config(keys), launch.first_world(), settings.options())
