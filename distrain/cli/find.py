"""``distrain find lr``: suggests a learning rate for a training."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distrain.cli.app import AUTO
from distrain.cli.training_keys import compose_training
from distrain.cli.typed_help import as_started
from distrain.config.schema import Config
from distrain.config.setting import setting
from distrain.errors import ConfigError, config_error
from distrain.files.terminal import show
from distrain.files.writing import to_json
from distrain.runtime.command_folder import agreed_folder, short_runs
from distrain.runtime.world import World
from distrain.tools.launching import launch_keys, slurm
from distrain.tools.launching.launch_keys import LaunchSettings
from distrain.tools.rate_finder import sweep
from distrain.tools.rate_finder.curve import Curve
from distrain.training.run_plan import RunPlan

#: What can be found.
SUBJECTS = ("lr",)
_JSON, _PICTURE = "find_lr.json", "find_lr.png"


@dataclass
class FindSettings:
    """Keys of ``distrain find lr``."""

    what: str = setting("What to find: lr, the learning rate.", choices=SUBJECTS)
    steps: int = setting("Training steps, in which the rate rises; it ends where the loss diverges.", at_least=10)
    lowest: float = setting("Learning rate of the first step.", above=0)
    highest: float = setting("Learning rate of the last step.", above=0)
    folder: str | None = setting(f"Folder for {_JSON} and {_PICTURE}; null: outputs/find/<date>_<time>.", path=True)

    def __post_init__(self) -> None:
        """Refuses rates that don't rise.

        Raises:
            ConfigError: One line that names the key.
        """
        if self.highest <= self.lowest:
            raise ConfigError("highest", self.highest, f"must be above lowest={self.lowest:g}")


def run(settings: FindSettings, keys: Sequence[str]) -> Curve:
    """Sweeps the rate; rank 0 prints and writes what was found.

    Args:
        settings: The command's settings.
        keys: Settings of the training.

    Raises:
        ConfigError: A setting is wrong, or the training can't run.
        Failed: A rank failed.
    """
    world = slurm.world_of_process()
    config = _training(keys)
    folder = agreed_folder(config, world, "find", settings.folder)
    with short_runs(folder, world) as runs:
        config = sweep.prepare(config, settings.steps, settings.lowest, runs)
        curve = sweep.record(config, world, settings.steps, settings.lowest, settings.highest)
    if world.rank == 0:
        _report(curve, folder, keys, world)
    return curve


def _report(curve: Curve, folder: Path, keys: Sequence[str], world: World) -> None:
    folder.joinpath(_JSON).write_text(to_json(curve.to_plain()))
    curve.draw().savefig(folder / _PICTURE)
    if not curve.rates:
        raise config_error("find", "the loss of the first step is not finite")
    end = f"diverged at {curve.rates[-1]:.3g}" if curve.diverged else f"the last step had {curve.rates[-1]:.3g}"
    show(f"{len(curve.rates)} steps from lr={curve.rates[0]:.3g} on, {end}; smallest loss {min(curve.smoothed):.4g}")
    rate = curve.suggestion()
    if rate is None:
        show("no suggestion: the loss fell at no rate; try other lowest=… and highest=…, or more steps=…")
    else:
        show(f"the loss falls fastest at optimizer.lr={rate:.2g}")
        show(f"to train with it: {_train_command([*keys, f'optimizer.lr={rate:.2g}'], world)}")
    show(f"curve: {folder / _PICTURE}; numbers: {folder / _JSON}")


def _train_command(keys: Sequence[str], world: World) -> str:
    """The training on as many ranks as these, as a line to type; the last key replaces an earlier rate."""
    others = [key for key in keys if key.partition("=")[0] != "optimizer.lr"] + list(keys[-1:])
    ranks = [f"nproc={world.size}"] if world.size > 1 else []
    return as_started(shlex.join(["distrain", "train", *ranks, *others]))


def _training(keys: Sequence[str]) -> Config:
    """The training whose rate is to be found.

    Raises:
        ConfigError: A key is wrong, says which ranks are started, or names no strategy.
    """
    for key in keys:
        name = key.partition("=")[0]
        if name in launch_keys.docs():
            problem = "is a key of find itself; write it before --, as in: distrain find lr nproc=2 -- model=resnet18"
            raise config_error(name, problem)
    config = compose_training(keys)
    if config.strategy.name == AUTO:
        raise ConfigError("strategy", AUTO, "a rate is found under the strategy that trains; name it")
    return config


def check(settings: FindSettings, keys: Sequence[str], launch: LaunchSettings) -> None:
    """Refuses what ranks would refuse, before they are started.

    Raises:
        ConfigError: As :func:`run`.
    """
    if launch.max_restarts or launch.nodes[0] != launch.nodes[1]:
        raise config_error("find", "trains on ranks that stay; leave max_restarts and nnodes=MIN:MAX out")
    config = sweep.prepare(_training(keys), settings.steps, settings.lowest, None)
    RunPlan.resolve(config, launch.first_world()).check(warn=False)
