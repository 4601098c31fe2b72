"""``distrain plan``: predicts what a step takes under each strategy."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distrain.cli.training_keys import compose_training
from distrain.config.schema import Config
from distrain.config.setting import setting
from distrain.errors import ConfigError, config_error
from distrain.files.terminal import show
from distrain.runtime.command_folder import agreed_folder, short_runs
from distrain.runtime.world import World
from distrain.strategies.fsdp.options import FSDPConfig
from distrain.strategies.mesh.options import MeshConfig
from distrain.tools.launching import launch_keys, slurm
from distrain.tools.launching.launch_keys import LaunchSettings
from distrain.tools.planning import engine, figure
from distrain.tools.planning.cluster import Link
from distrain.tools.planning.phases import PhaseClock
from distrain.tools.planning.plan import Plan
from distrain.tools.planning.plan_file import FILE
from distrain.tools.planning.plan_keys import STRATEGIES, with_keys


@dataclass
class PlanSettings:
    """Keys of ``distrain plan``."""

    cluster: str | None = setting(
        "YAML file that describes a cluster; null: the ranks that are started are measured.", path=True
    )
    strategies: list[str] = setting("Strategies to look at.", choices=STRATEGIES)
    rows: int = setting("Configurations to show.", at_least=1)
    check: int = setting("Run so many of the fastest, and ddp, for a few steps, and show what they take.", at_least=0)
    most_hosts: int = setting("Hosts up to which plan.png shows step times.", at_least=1)
    gbit_per_s: float | None = setting(
        "Bandwidth between hosts for plan.png where only one host is measured, in Gbit/s; null: no picture.", above=0
    )
    folder: str | None = setting(f"Folder for {FILE} and pictures; null: outputs/plan/<date>_<time>.", path=True)

    def __post_init__(self) -> None:
        """Refuses values that make no plan together.

        Raises:
            ConfigError: One line that names the key.
        """
        if not self.strategies:
            raise ConfigError("strategies", [], "names none", STRATEGIES)
        if self.check and self.cluster is not None:
            raise ConfigError("check", self.check, "runs what is planned, and the ranks of cluster=… aren't here", [0])

    def options(self, config: Config) -> engine.Options:
        """What is asked of a plan of a training."""
        block_mb = config.strategy.block_mb if isinstance(config.strategy, FSDPConfig | MeshConfig) else None
        cluster = Path(self.cluster) if self.cluster else None
        return engine.Options(cluster, tuple(self.strategies), block_mb=block_mb)


def run(settings: PlanSettings, keys: Sequence[str]) -> Plan:
    """Makes a plan; rank 0 prints and writes it.

    Args:
        settings: The command's settings.
        keys: Settings of the training.

    Raises:
        ConfigError: A setting is wrong, or the training can't run.
        Failed: A rank failed.
        Stopped: A rank was asked to stop during a short run.
    """
    world = slurm.world_of_process()
    config = _training(keys)
    options = settings.options(config)
    # To compose each configuration from the command line would take a tenth of a second.
    config_of = functools.partial(with_keys, config)
    checked = engine.check(config, world, options)
    folder = agreed_folder(config, world, "plan", settings.folder)
    clock = PhaseClock.since_start()
    with short_runs(folder, world) as runs:
        made = _made(settings, options, checked, world, config_of, runs, clock)
    if world.rank == 0:
        with clock.phase("pictures"):
            drawn = _draw(made, settings, folder)
        made = dataclasses.replace(made, planning_seconds=clock.seconds)
        show(f"plan: {made.write(folder)}{drawn}")
    return made


def _made(
    settings: PlanSettings,
    options: engine.Options,
    checked: engine.Checked,
    world: World,
    config_of: engine.ConfigOf,
    runs: Path,
    clock: PhaseClock,
) -> Plan:
    """The plan with the short runs that are asked for; rank 0 prints it."""
    made = engine.make_plan(checked, world, options, config_of, runs, clock)
    if world.rank == 0:
        for line in made.lines(settings.rows):
            show(line)
    if settings.check:
        with clock.phase("trials"):
            made = engine.try_twice(made, made.chosen_for_trial(settings.check), config_of, world, runs)
        if world.rank == 0:
            for line in made.trial_lines():
                show(line)
    return made


def _draw(made: Plan, settings: PlanSettings, folder: Path) -> str:
    """Draws what can be drawn, and returns what to say of it."""
    said = ""
    step = figure.draw_step(made.predictions)
    if step is not None:
        path = folder / "timeline.png"
        step.savefig(path)
        said = f"; a step of the fastest pipeline: {path}"
    cluster = made.cluster
    if cluster.hosts == 1:
        if settings.gbit_per_s is None:
            return said
        cluster = dataclasses.replace(cluster, between=Link.of(100e-6, settings.gbit_per_s * 1e9 / 8))
    curves = figure.curves(made.workload, cluster, settings.most_hosts, settings.strategies)
    path = folder / "plan.png"
    figure.draw(curves, made.workload.batch_size).savefig(path)
    return f"{said}; step times by number of hosts: {path}"


def _training(keys: Sequence[str]) -> Config:
    """The training to plan.

    Raises:
        ConfigError: A key is wrong, or says which ranks are started.
    """
    for key in keys:
        name = key.partition("=")[0]
        if name in launch_keys.docs():
            problem = "is a key of plan itself; write it before --, as in: distrain plan nproc=2 -- model=resnet18"
            raise config_error(name, problem)
    return compose_training(keys)


def check(settings: PlanSettings, keys: Sequence[str], launch: LaunchSettings) -> None:
    """Refuses what ranks would refuse, before they are started.

    Raises:
        ConfigError: As :func:`run`.
    """
    if launch.max_restarts or launch.nodes[0] != launch.nodes[1]:
        raise config_error("plan", "measures ranks that stay; leave max_restarts and nnodes=MIN:MAX out")
    config = _training(keys)
    engine.check(config, launch.first_world(), settings.options(config))
