"""``distrain.verify``: the certificate of a training of objects, or of one that is named by keys."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from distrain.api.fit import prepare
from distrain.api.ranks import run_on_ranks
from distrain.api.settings import merge
from distrain.api.surroundings import restored_surroundings
from distrain.api.training import Training
from distrain.cli.verify import VerifySettings
from distrain.config.load import load_settings
from distrain.errors import config_error
from distrain.files.writing import to_json
from distrain.runtime import launcher, program
from distrain.runtime.garbage_collection import free_finished_trainings
from distrain.runtime.world import World
from distrain.tools.launching import slurm
from distrain.tools.launching.launch_keys import LaunchSettings
from distrain.verification import engine, launched
from distrain.verification.engine import Options
from distrain.verification.launched import Verification

_NAME = "distrain.verify"
_EXAMPLE = f"{_NAME}(model, train, strategy='ddp', nproc=2)"


def verify(
    *what: Any,
    nproc: int = 2,
    steps: int = 10,
    tolerance: float | None = None,
    float64: bool = True,
    folder: str | os.PathLike[str] | None = None,
    timeout: float | None = None,
    val: Any = None,
    test: Any = None,
    classes: int | Sequence[str] | None = None,
    config_dir: str | os.PathLike[str] | None = None,
    keys: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Verification:
    """Compares a training on several ranks with that of one process, as the command ``verify`` does.

    ::

        found = distrain.verify(model, (x, y), strategy="ddp", batch_size=64, nproc=2)
        print(found.text)
        found = distrain.verify("strategy=ddp", "model=resnet18", nproc=2)

    Under torchrun all ranks call it with the same objects; otherwise it starts ``nproc`` ranks. The model keeps its
    parameters.

    Args:
        *what: A model and the samples to train on, as for :func:`distrain.fit`; or settings of the training, as on the
            command line: ``"strategy=ddp"``, ``"model=resnet18"``, and options like ``"--config-dir"``, ``"my_conf"``.
        nproc: Ranks to start on this machine.
        steps: Updates of each compared run.
        tolerance: Largest relative difference that counts as equal; by default it is measured.
        float64: Whether to compare in float64 first.
        folder: For ``certificate.json``; by default it is not kept.
        timeout: Seconds after which the ranks are ended; only with settings as on the command line.
        val: As for :func:`distrain.fit`, and like all that follows only with objects.
        test: As for :func:`distrain.fit`.
        classes: As for :func:`distrain.fit`.
        config_dir: As for :func:`distrain.fit`.
        keys: As for :func:`distrain.fit`.
        **settings: As for :func:`distrain.fit`.

    Returns:
        The certificate, whatever it says.

    Raises:
        ConfigError: An argument is refused.
        Failed: A run failed; the message says why, as far as it was not printed.
    """
    given = {"val": val, "test": test, "classes": classes, "config_dir": config_dir, "keys": keys, **settings}
    if _are_keys(what):
        for name, value in given.items():
            if value is not None:
                raise config_error(name, f"goes with a model and samples, as in {_EXAMPLE}")
        return launched.verify(
            *what, nproc=nproc, steps=steps, tolerance=tolerance, float64=float64, folder=folder, timeout=timeout
        )
    if len(what) != 2:
        raise config_error(_NAME, f"takes a model and the samples to train on, or keys; as in {_EXAMPLE}")
    if timeout is not None:
        raise config_error("timeout", "goes with keys of the command line only; leave it out")
    launched.check_ranks(nproc, _EXAMPLE)
    limited = {"steps": steps, "tolerance": tolerance, "float64": float64, "folder": None, "keep": False}
    load_settings(VerifySettings, DictConfig(limited))
    model, train = what
    with tempfile.TemporaryDirectory(prefix="distrain_verify_") as temporary:
        place = Path(folder or temporary).resolve()
        options = Options(steps, tolerance, float64, place, example=_EXAMPLE)
        with restored_surroundings(), program.called_as(_NAME):
            slurm.set_torchrun_variables(os.environ)
            training = prepare(model, train, val, test, classes, (), config_dir, merge(settings, keys or {}))
            if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
                # Each rank has a temporary folder of its own; rank 0's is taken.
                found = verify_on_rank(training, options)
            else:
                found = _verify_on_ranks(training, options, nproc)
            free_finished_trainings()
            return found


def _are_keys(what: Sequence[Any]) -> bool:
    """Whether these are settings as on the command line, and not names of a model and a data set."""
    texts = all(isinstance(word, str) for word in what)
    return texts and (not what or any("=" in word or word.startswith("-") for word in what))


def verify_on_rank(training: Training, options: Options) -> Verification:
    """Verifies as one of the ranks.

    Args:
        training: What is verified.
        options: How; the command is filled in.

    Raises:
        ConfigError: The training can't run.
        Failed: A run failed.
    """
    world = World.from_environment()
    options = dataclasses.replace(options, command=launcher.command(sys.argv, os.environ, ranks=world.local_size))
    with training.objects():
        certificate = engine.verify(training.config, world, options)
    content = json.loads(to_json(certificate.to_plain()))
    return Verification(certificate.passed, certificate.verdict, content, "\n".join(certificate.lines()))


def _verify_on_ranks(training: Training, options: Options, nproc: int) -> Verification:
    """Starts ranks that verify, and returns what rank 0 has found."""
    launch = LaunchSettings(nproc=nproc)
    with training.objects():
        engine.check(training.config, launch.first_world(), options.example)
    plain = {**dataclasses.asdict(options), "folder": str(options.folder)}
    return Verification(**run_on_ranks(training, launch, plain))


def options_of(plain: Mapping[str, Any]) -> Options:
    """The options that were sent to a rank."""
    return Options(**{**plain, "folder": Path(plain["folder"])})
