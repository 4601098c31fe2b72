"""``distrain verify``: compares a training on several ranks with that of one process."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from distrain.cli import hydra_entry
from distrain.cli.arguments import refuse_python_objects
from distrain.config.folder import CONF
from distrain.config.load import load_config
from distrain.config.schema import Config, setting
from distrain.errors import Failed, config_error
from distrain.files.terminal import show
from distrain.runtime import launcher
from distrain.runtime.world import World
from distrain.tools.launching import launch_keys, slurm
from distrain.tools.launching.launch_keys import LaunchSettings
from distrain.verification import engine
from distrain.verification.certificate import FILE, Certificate


@dataclass
class VerifySettings:
    """Keys of ``distrain verify``."""

    steps: int = setting("Updates of each compared run.", at_least=2, at_most=10_000)
    tolerance: float | None = setting(
        "Largest relative difference that counts as equal; null: measured, by reordering the run of one process.",
        above=0,
        below=1,
    )
    float64: bool = setting("Compare in float64 before the run's own precision.")
    folder: str | None = setting(
        f"Folder for {FILE}, which all hosts see; null: outputs/verify/<date>_<time>.", path=True
    )
    keep: bool = setting("Keep the folders of the compared runs.")


def run(settings: VerifySettings, keys: Sequence[str]) -> Certificate:
    """Verifies a training; rank 0 prints and writes the certificate.

    Args:
        settings: The command's settings.
        keys: Settings of the training.

    Raises:
        ConfigError: A setting is wrong, or the training can't run.
        Failed: The training is not that of one process, or a run failed.
    """
    slurm.set_torchrun_variables(os.environ)
    world = World.from_environment()
    options = engine.Options(
        settings.steps,
        settings.tolerance,
        settings.float64,
        Path(settings.folder) if settings.folder else None,
        settings.keep,
        launcher.command([*sys.argv, "--", *keys], os.environ),
    )
    certificate = engine.verify(training_config(keys), world, options, _print)
    if not certificate.passed:
        raise Failed
    return certificate


def _print(certificate: Certificate, path: Path) -> None:
    for line in certificate.lines():
        show(line)
    show(f"certificate: {path}")


def check(keys: Sequence[str], launch: LaunchSettings) -> None:
    """Refuses what ranks would refuse, before they are started.

    Raises:
        ConfigError: As :func:`run`.
    """
    if launch.max_restarts or launch.nodes[0] != launch.nodes[1]:
        raise config_error("verify", "compares ranks that stay; leave max_restarts and nnodes=MIN:MAX out")
    engine.check(training_config(keys), launch.first_world())


def training_config(keys: Sequence[str]) -> Config:
    """The checked configuration of a training.

    Raises:
        ConfigError: A key is wrong.
    """
    for key in keys:
        name = key.partition("=")[0]
        if name in launch_keys.docs():
            raise config_error(name, f"is a key of verify itself; write it before --, as in: verify {key} -- …")
    try:
        refuse_python_objects(keys)
        composed = hydra_entry.compose(CONF, "config", keys)
    except (HydraException, OmegaConfBaseException) as error:
        raise hydra_entry.to_config_error(error, CONF, "config", keys) from error
    return load_config(composed)
