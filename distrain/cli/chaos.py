"""``distrain chaos``: tests whether trainings recover from injected faults."""

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

from distrain.cli import hydra_entry, output
from distrain.cli.training_keys import compose_training
from distrain.config.schema import Config
from distrain.config.setting import setting
from distrain.errors import ConfigError, Failed, config_error
from distrain.files.terminal import show
from distrain.runtime.world import World
from distrain.tools.chaos import processes, report
from distrain.tools.chaos.campaign import Campaign, UnusableTraining
from distrain.tools.chaos.disturbed_run import Recovery, TrainingSpec
from distrain.tools.chaos.launchers import CommandLauncher, HostPerRankLauncher, Launcher
from distrain.tools.chaos.plan import FAULT_KINDS
from distrain.tools.launching.processes import TerminationRequested, termination_signals_raise
from distrain.tools.testnet.network import VirtualNetwork
from distrain.training.run_plan import RunPlan

_NETWORK_KINDS = [name for name, kind in FAULT_KINDS.items() if kind.needs_network]


@dataclass
class ChaosSettings:
    """Keys of ``distrain chaos``."""

    faults: int = setting("Number of faults over all trainings.", at_least=1)
    faults_per_run: int = setting("Maximum number of faults per run.", at_least=1)
    kinds: list[str] = setting("Kinds of faults; none: all that are possible here.", choices=FAULT_KINDS)
    seed: int = setting("Determines which fault strikes which rank, and when.", at_least=0)
    nproc: int = setting("Number of ranks.", at_least=1)
    launcher: str = setting("The command that starts a training.")
    folder: str | None = setting("Parent of the runs' folders; null: outputs/chaos/<date>_<time>.", path=True)
    keep: bool = setting("Keep the folders of correct runs too.")
    patience_seconds: float = setting("A run that logs nothing for this long is given up.", above=0)
    json: str | None = setting("Result file.", path=True)


def run(settings: ChaosSettings, trainings: Sequence[Sequence[str]], conf: Path) -> list[Recovery]:
    """Injects faults into each training, prints the outcome, and writes the result file.

    Args:
        settings: The command's settings.
        trainings: The configuration keys of each training.
        conf: The folder of YAML files.

    Returns:
        The outcome of each fault.

    Raises:
        ConfigError: A setting or a training's key is invalid.
        Failed: A run did not recover, or ended with other parameters.
    """
    result_file = Path(settings.json) if settings.json else None
    if result_file:
        output.check_writable(result_file)
    if not Path("/proc/self/environ").exists():
        raise config_error("chaos", "finds processes through /proc, which only Linux has")
    launcher = CommandLauncher(settings.launcher, settings.nproc)
    if not trainings:
        raise config_error("training", "none is given; write its keys after --, as in: -- strategy=ddp")
    specs = _number_equal_names([_training_spec(keys, settings.nproc, conf) for keys in trainings])
    kinds = _possible_kinds(settings)
    folder = _make_folder(settings.folder)
    show(f"folder of the runs: {folder}")
    recoveries: list[Recovery] = []
    unusable: UnusableTraining | None = None
    try:
        with processes.ended_with_this_process(), termination_signals_raise(once=True):
            for number, training in enumerate(specs):
                campaign = Campaign(
                    training,
                    launcher,
                    functools.partial(_open_network, settings.nproc),
                    folder / training.name.replace(" ", "_"),
                    patience_seconds=settings.patience_seconds,
                    keep=settings.keep,
                    print_line=show,
                    recoveries=recoveries,
                )
                share = settings.faults // len(specs) + (number < settings.faults % len(specs))
                if share:
                    campaign.run(kinds, share, settings.faults_per_run, str(settings.seed))
    except UnusableTraining as error:
        unusable = error
    except TerminationRequested as request:
        show(f"chaos: {request}; its trainings have been ended")
        raise hydra_entry.ExitWithCode(request.code) from request
    if recoveries:
        show(report.table(recoveries))
    if result_file:
        results = report.content(recoveries, dataclasses.asdict(settings))
        output.write(result_file, lambda path: path.write_text(json.dumps(results, indent=2) + "\n"))
    if unusable is not None:
        show(f"distrain: {unusable}")
        raise Failed from unusable
    if not all(recovery.recovered and recovery.identical for recovery in recoveries):
        raise Failed
    return recoveries


def _training_spec(keys: Sequence[str], nproc: int, conf: Path) -> TrainingSpec:
    """Checks a training's keys with the checks that the training itself does.

    Raises:
        ConfigError: A key is invalid.
    """
    checked = compose_training(keys, conf)
    for key, value in (("run_dir", checked.run_dir), ("resume", checked.resume)):
        if value not in (None, "auto"):
            raise ConfigError(key, value, "is chosen by this command")
    RunPlan.resolve(checked, World(0, nproc, 0, nproc, socket.gethostname())).check()
    runtime = checked.runtime
    return TrainingSpec(
        _training_name(checked),
        tuple(keys),
        nproc,
        max(runtime.timeout_seconds, runtime.heartbeat_timeout_seconds),
        runtime.setup_timeout_seconds,
    )


def _training_name(checked: Config) -> str:
    name = checked.strategy.name
    return name if checked.compression.name == "none" else f"{name} {checked.compression.name}"


def _number_equal_names(trainings: Sequence[TrainingSpec]) -> list[TrainingSpec]:
    """Appends a number to names that several trainings share."""
    names = [training.name for training in trainings]
    return [
        dataclasses.replace(training, name=f"{training.name} {names[:place].count(training.name) + 1}")
        if names.count(training.name) > 1
        else training
        for place, training in enumerate(trainings)
    ]


def _possible_kinds(settings: ChaosSettings) -> list[str]:
    """The kinds of faults that can be injected on this machine.

    Raises:
        ConfigError: A requested kind can't be injected.
    """
    requested = list(settings.kinds) or list(FAULT_KINDS)
    if not set(requested) & set(_NETWORK_KINDS):
        return requested
    problem = None if settings.nproc > 1 else "there is no link with one rank"
    problem = problem or _network_problem(settings.nproc)
    if problem is None:
        return requested
    if settings.kinds:
        raise ConfigError(
            "kinds", ",".join(settings.kinds), f"{' and '.join(_NETWORK_KINDS)} can't be injected: {problem}"
        )
    show(f"left out: {', '.join(_NETWORK_KINDS)}, because {problem}")
    return [name for name in requested if name not in _NETWORK_KINDS]


def _network_problem(hosts: int) -> str | None:
    """Why this machine can't make a test network of this many hosts; ``None`` if it can."""
    try:
        with VirtualNetwork(hosts) as network:
            network.add_delay(0.001)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return None


@contextlib.contextmanager
def _open_network(nproc: int) -> Iterator[tuple[Launcher, VirtualNetwork]]:
    with VirtualNetwork(nproc) as network:
        yield HostPerRankLauncher(network), network


def _make_folder(name: str | None) -> Path:
    now = datetime.datetime.now()
    folder = Path(name) if name else Path("outputs", "chaos", f"{now:%Y-%m-%d_%H-%M-%S}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ConfigError("folder", folder, "is not empty; runs in it would be resumed")
    except OSError as error:
        raise ConfigError("folder", folder, f"can't be created ({error.strerror})") from error
    return folder.resolve()
