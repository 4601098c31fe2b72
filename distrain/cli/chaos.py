"""Trying out whether trainings survive what clusters do to them."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from distrain.cli import hydra_entry, output
from distrain.config.load import load_config
from distrain.config.schema import Config, setting
from distrain.errors import ConfigError, Failed, config_error
from distrain.runtime.world import World
from distrain.tools.chaos import report
from distrain.tools.chaos.campaign import Campaign, Unusable
from distrain.tools.chaos.disturbed import Recovery, Training
from distrain.tools.chaos.job import Hosts, Launcher, OneHost
from distrain.tools.chaos.plan import KINDS
from distrain.tools.testnet.network import VirtualNetwork
from distrain.training.run_plan import RunPlan

_NETWORKED = [name for name, kind in KINDS.items() if kind.needs_network]


@dataclass
class ChaosSettings:
    """Keys of ``launch/chaos.py``."""

    faults: int = setting("How many faults, over all trainings.", at_least=1)
    faults_per_run: int = setting("How many of them strike one run.", at_least=1)
    kinds: list[str] = setting("Kinds of faults; none: all that are possible here.", choices=KINDS)
    seed: int = setting("Settles which fault strikes whom and when.", at_least=0)
    nproc: int = setting("Ranks.", at_least=1)
    launcher: str = setting("The command that starts a training.")
    folder: str | None = setting("Where runs go; null: outputs/chaos/<date>_<time>.")
    keep: bool = setting("Keep the folders of runs that came out right, too.")
    patience_seconds: float = setting("A run that logs nothing for so long is given up.", above=0)
    json: str | None = setting("Result file.")


def run(settings: ChaosSettings, trainings: Sequence[Sequence[str]], conf: Path, launch: Path) -> list[Recovery]:
    """Hurts each training, prints what came of it, and writes the result file.

    Args:
        settings: How.
        trainings: Each training's keys.
        conf: The folder of YAML files.
        launch: The folder of ``train.py``.

    Raises:
        ConfigError: A setting or a training's key can't be used.
        Failed: A run did not recover, or came out differently.
    """
    target = Path(settings.json).expanduser() if settings.json else None
    if target:
        output.check_writable(target)
    if not Path("/proc/self/environ").exists():
        raise config_error("chaos", "finds processes by /proc, which only Linux has")
    launcher = OneHost(settings.launcher, launch, settings.nproc)
    if not trainings:
        raise config_error("training", "none is given; put its keys after --, as in: -- strategy=ddp")
    hurt = _named([_training(keys, settings.nproc, conf) for keys in trainings])
    kinds = _possible(settings)
    folder = _folder(settings.folder)
    print(f"runs go to {folder}", flush=True)
    recoveries: list[Recovery] = []
    unusable: Unusable | None = None
    try:
        for number, training in enumerate(hurt):
            campaign = Campaign(
                training,
                launcher,
                functools.partial(_networked, settings.nproc, launch),
                folder / training.name.replace(" ", "_"),
                patience_seconds=settings.patience_seconds,
                keep=settings.keep,
                say=functools.partial(print, flush=True),
                recoveries=recoveries,
            )
            share = settings.faults // len(hurt) + (number < settings.faults % len(hurt))
            if share:
                campaign.run(kinds, share, settings.faults_per_run, str(settings.seed))
    except Unusable as error:
        unusable = error
    if recoveries:
        print(report.table(recoveries), flush=True)
    if target:
        told = report.content(recoveries, dataclasses.asdict(settings))
        output.write(target, lambda path: path.write_text(json.dumps(told, indent=2) + "\n"))
    if unusable is not None:
        print(f"distrain: {unusable}", flush=True)
        raise Failed from unusable
    if not all(each.recovered and each.identical for each in recoveries):
        raise Failed
    return recoveries


def _training(keys: Sequence[str], nproc: int, conf: Path) -> Training:
    """Checks a training's keys as the training itself will."""
    try:
        composed = hydra_entry.compose(conf, "config", keys)
    except (HydraException, OmegaConfBaseException) as error:
        raise hydra_entry.to_config_error(error, conf, "config", keys) from error
    checked = load_config(composed)
    for key, value in (("run_dir", checked.run_dir), ("resume", checked.resume)):
        if value not in (None, "auto"):
            raise ConfigError(key, value, "is for this command to choose")
    RunPlan.resolve(checked, World(0, nproc, 0, nproc, socket.gethostname())).check()
    runtime = checked.runtime
    return Training(
        _name(checked),
        tuple(keys),
        nproc,
        max(runtime.timeout_seconds, runtime.heartbeat_timeout_seconds),
        runtime.setup_timeout_seconds,
    )


def _name(checked: Config) -> str:
    name = checked.strategy.name
    return name if checked.compression.name == "none" else f"{name} {checked.compression.name}"


def _named(trainings: Sequence[Training]) -> list[Training]:
    """Gives trainings of the same name a number."""
    names = [training.name for training in trainings]
    return [
        dataclasses.replace(training, name=f"{training.name} {names[:place].count(training.name) + 1}")
        if names.count(training.name) > 1
        else training
        for place, training in enumerate(trainings)
    ]


def _possible(settings: ChaosSettings) -> list[str]:
    """The kinds of faults that can be done here.

    Raises:
        ConfigError: One that was asked for can't be done.
    """
    wanted = list(settings.kinds) or list(KINDS)
    if not set(wanted) & set(_NETWORKED):
        return wanted
    problem = None if settings.nproc > 1 else "one rank has no link to another"
    problem = problem or _no_network(settings.nproc)
    if problem is None:
        return wanted
    if settings.kinds:
        raise ConfigError("kinds", ",".join(settings.kinds), f"{' and '.join(_NETWORKED)} can't be done: {problem}")
    print(f"left out: {', '.join(_NETWORKED)}, because {problem}", flush=True)
    return [name for name in wanted if name not in _NETWORKED]


def _no_network(hosts: int) -> str | None:
    """Why there can be no test network of so many hosts, if so."""
    try:
        with VirtualNetwork(hosts) as network:
            network.add_delay(0.001)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return None


@contextlib.contextmanager
def _networked(nproc: int, launch: Path) -> Iterator[tuple[Launcher, VirtualNetwork]]:
    with VirtualNetwork(nproc) as network:
        yield Hosts(network, launch), network


def _folder(wanted: str | None) -> Path:
    now = datetime.datetime.now()
    folder = Path(wanted).expanduser() if wanted else Path("outputs", "chaos", f"{now:%Y-%m-%d_%H-%M-%S}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ConfigError("folder", folder, "is not empty; runs in it would be gone on with")
    except OSError as error:
        raise ConfigError("folder", folder, f"can't be made ({error.strerror})") from error
    return folder.resolve()
