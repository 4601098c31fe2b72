"""Compares the predictions of ``distrain plan`` with measured steps, on this machine and on test networks.

Each setting is a model on ranks of one host, or on hosts of a test network with a rank each (needs root). In each, a
plan is made and its configurations are run for a few steps (``check=``). Nothing is fitted: each setting is measured
once, before its own configurations are run. Prints a row for each configuration, then the errors of all, and how often
the fastest predicted configuration is the fastest measured one.

    python benchmarks/plan.py [--models simple_cnn cifar_cnn resnet18] [--ranks 2 3] [--hosts 2 4]
        [--rates none 1gbit 100mbit] [--check 8] [--strategies ddp local_sgd] [--folder plans]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Keys of the models' trainings; synthetic images, so that no data set is needed.
KEYS = {
    "simple_cnn": ["model=simple_cnn", "data=digits", "data.batch_size=64"],
    "cifar_cnn": ["model=cifar_cnn", "data=synthetic", "data.height=32", "data.width=32", "data.batch_size=64"],
    "resnet18": ["model=resnet18", "data=synthetic", "data.height=32", "data.width=32", "data.batch_size=16"],
}
COMMON = ["data.train_size=2000", "data.test_size=64"]
#: The mean error, and the error of nine of ten configurations, that plans should keep.
MEAN, NINE_OF_TEN = 0.08, 0.15


@dataclass(frozen=True)
class Setting:
    """Where a model is planned.

    Attributes:
        model: Its name in ``KEYS``.
        hosts: Hosts of a test network; 1: this machine.
        ranks: Ranks on each host.
        rate: Rate at which a host can send; ``none``: no limit.
    """

    model: str
    hosts: int
    ranks: int
    rate: str = "none"

    def __str__(self) -> str:
        where = f"{self.ranks} ranks" if self.hosts == 1 else f"{self.hosts} hosts, {self.rate}"
        return f"{self.model}, {where}"

    @property
    def training(self) -> list[str]:
        """Keys of the training."""
        # Hosts of a test network share this machine's processors, and each would take all of them.
        return ["runtime.threads=1", *KEYS[self.model], *(COMMON if "data=synthetic" in KEYS[self.model] else [])]

    def command(self, name: str, options: list[str]) -> list[str]:
        """A command of distrain on the ranks of this setting."""
        if self.hosts == 1:
            return [sys.executable, "-m", "distrain", name, f"nproc={self.ranks}", *options]
        network = [sys.executable, "-m", "distrain", "testnet", f"hosts={self.hosts}"]
        rate = [] if self.rate == "none" else [f"rate={self.rate}"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1"]
        return [*network, *rate, "--", *torchrun, "-m", "distrain", name, *options]


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which settings to measure."""
    parser.add_argument("--models", nargs="+", default=list(KEYS), choices=KEYS)
    parser.add_argument("--ranks", nargs="*", type=int, default=[2, 3], help="ranks of this machine")
    parser.add_argument("--hosts", nargs="*", type=int, default=[2, 4], help="hosts of test networks")
    parser.add_argument("--rates", nargs="+", default=["none", "1gbit", "100mbit"])


def settings_of(arguments: argparse.Namespace) -> list[Setting]:
    """The settings that the options of :func:`add_settings` ask for, those of this machine first."""
    here = itertools.product(arguments.models, arguments.ranks)
    networks = itertools.product(arguments.models, arguments.hosts, arguments.rates)
    return [
        *(Setting(model, 1, ranks) for model, ranks in here),
        *(Setting(model, hosts, 1, rate) for model, hosts, rate in networks),
    ]


def main() -> None:
    """Makes all plans and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_settings(parser)
    parser.add_argument("--check", type=int, default=8, help="configurations to run in each setting")
    everything = ["ddp", "fsdp", "tensor_parallel", "pipeline", "mesh", "local_sgd", "parameter_server"]
    parser.add_argument("--strategies", nargs="+", default=everything)
    parser.add_argument("--folder", type=Path, default=Path("plans"))
    arguments = parser.parse_args()
    options = [f"check={arguments.check}", "rows=1", f"strategies=[{','.join(arguments.strategies)}]"]
    plans: dict[Setting, dict[str, Any]] = {}
    for number, setting in enumerate(settings_of(arguments)):
        folder = (arguments.folder / str(number)).resolve()
        print(f"# {setting}", flush=True)
        command = setting.command("plan", [*options, f"folder={folder}", "most_hosts=1", "--", *setting.training])
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        plans[setting] = json.loads((folder / "plan.json").read_text())
        show(plans[setting])
    summarise(plans)


def predictions(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """The configurations that were run, without those by which the plan was calibrated."""
    return [trial for trial in plan["trials"] if trial["keys"] not in plan["calibrated_on"]]


def show(plan: dict[str, Any]) -> None:
    """Prints a row for each configuration of a setting."""
    for trial in sorted(predictions(plan), key=lambda trial: trial["measured_ms"]):
        keys = " ".join(f"{key}={value}" for key, value in trial["keys"].items())
        print(
            f"{trial['predicted_ms']:9.1f} ms  {trial['measured_ms']:9.1f} ms  {error(trial):+7.1%}  {keys}", flush=True
        )


def error(trial: dict[str, Any]) -> float:
    """By how much a prediction is too long, relative to the measured step."""
    return float(trial["predicted_ms"] / trial["measured_ms"] - 1)


def summarise(plans: dict[Setting, dict[str, Any]]) -> None:
    """Prints the errors of all configurations, and how often the fastest one was predicted."""
    trials = [trial for plan in plans.values() for trial in predictions(plan)]
    errors = sorted(abs(error(trial)) for trial in trials)
    within = sum(one <= NINE_OF_TEN for one in errors) / len(errors)
    first, lost = 0, []
    for plan in plans.values():
        fastest = min(trial["measured_ms"] for trial in plan["trials"])
        chosen = min(plan["trials"], key=lambda trial: trial["predicted_ms"])["measured_ms"]
        first += chosen == fastest
        lost.append(chosen / fastest - 1)
    print(f"{len(errors)} configurations in {len(plans)} settings")
    print(f"mean error of a step's time: {statistics.mean(errors):.1%} (at most {MEAN:.0%})")
    print(f"within {NINE_OF_TEN:.0%}: {within:.0%} (at least 90%)")
    print(f"fastest one is first in {first / len(plans):.0%} of settings; otherwise it costs up to {max(lost):.1%}")


if __name__ == "__main__":
    main()
