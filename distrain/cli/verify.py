"""``distrain verify``: compares a training on several ranks with that of one process."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distrain.cli.training_keys import compose_training
from distrain.config.schema import Config
from distrain.config.setting import setting
from distrain.errors import Failed, config_error, first_line
from distrain.files.terminal import print_to_stderr, show
from distrain.runtime import launcher, program
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
    world = slurm.world_of_process()
    options = engine.Options(
        settings.steps,
        settings.tolerance,
        settings.float64,
        Path(settings.folder) if settings.folder else None,
        settings.keep,
        launcher.command([*sys.argv, "--", *keys], os.environ),
        _example(keys, world.size),
    )
    certificate = engine.verify(training_config(keys), world, options, print_certificate)
    if not certificate.passed:
        raise Failed
    return certificate


def print_certificate(certificate: Certificate, path: Path) -> None:
    """Prints a certificate, and to standard error why the command ends with an exit code that is not 0.

    Raises:
        Failed: Nobody can read the certificate on standard output.
    """
    try:
        for line in certificate.lines():
            show(line)
        show(f"certificate: {path}")
    except (OSError, ValueError) as error:  # ValueError: the stream was closed
        verdict = certificate.verdict.upper()
        print_to_stderr(f"distrain: {verdict}, says {path}; it can't be printed ({first_line(error)})")
        raise Failed from error
    if not certificate.passed:
        # At once, and not by the launcher: that speaks for the rank that has ended first, which may be another one.
        print_to_stderr(f"distrain: the training is not that of one process; {path} says where it parts")


def check(keys: Sequence[str], launch: LaunchSettings) -> None:
    """Refuses what ranks would refuse, before they are started.

    Raises:
        ConfigError: As :func:`run`.
    """
    if launch.max_restarts or launch.nodes[0] != launch.nodes[1]:
        problem = "compares ranks that stay; leave max_restarts and nnodes=MIN:MAX out, as in"
        raise config_error("verify", f"{problem}: {_example(keys, launch.ranks_per_host())}")
    world = launch.first_world()
    engine.check(training_config(keys), world, _example(keys, world.local_size))


def _example(keys: Sequence[str], ranks: int) -> str:
    """The user's command as it would not be refused, for a message.

    Args:
        keys: Settings of the training.
        ranks: Ranks on this machine.
    """
    strategies = [key for key in keys if key.partition("=")[0] == "strategy"] or ["strategy=ddp"]
    left_out = ("strategy", "run_dir", "resume", *launch_keys.docs())
    others = [key for key in keys if key.partition("=")[0] not in left_out]
    if strategies == [f"strategy={engine.SINGLE}"]:
        strategies = ["strategy=ddp"]
    own = [f"nproc={max(ranks, 2)}", *sys.argv[1:]]
    return shlex.join([*program.on_one_rank(sys.argv[0]), *own, "--", *strategies, *others])


def training_config(keys: Sequence[str]) -> Config:
    """The checked configuration of a training.

    Raises:
        ConfigError: A key is wrong.
    """
    for key in keys:
        name, _, value = key.partition("=")
        if name in launch_keys.docs():
            ranks = int(value) if name == "nproc" and value.isdecimal() else 2
            raise config_error(name, f"is a key of verify itself; write it before --, as in: {_example(keys, ranks)}")
    return compose_training(keys)
