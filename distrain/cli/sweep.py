"""A sweep: Hydra's sweeper composes jobs, each trains under a torchrun of its own, and one table holds the results."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser

from distrain.cli import hydra_entry
from distrain.config.schema import setting
from distrain.errors import ConfigError, config_error
from distrain.tools.launching import table
from distrain.tools.launching.jobs import DONE, Result, Runner, lines, make_jobs, quoted


@dataclass
class SweepSettings:
    """Keys of ``conf/hydra/launcher/torchrun.yaml``."""

    nproc: str = setting("Ranks a job: a number, or torchrun's gpu, cpu or auto.")
    minutes: float | None = setting("A job that takes longer is ended; null: no limit.", above=0)
    parallel: int = setting("Jobs at a time.", at_least=1)
    metric: str = setting("Which number of summary.json ranks the jobs, and is Optuna's.")
    grace_seconds: float = setting("A job that is ended has so long to save.", at_least=0)
    torchrun: list[str] = setting("More options for torchrun.")
    script: str | None = setting("What each job runs; null: the script itself.")
    jobs_file: str | None = setting("Write one line a job to this file and run none; null: run them.")


def torchrun(settings: SweepSettings, script: Path) -> list[str]:
    """The command for a job: each torchrun takes a free port, at an address that needs no name service."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"),
        *("--nproc-per-node", settings.nproc),
        *settings.torchrun,
        str(script),
    ]


class Sweep:
    """A sweep's jobs, as Hydra's sweeper hands them over, and what they came to so far.

    Args:
        settings: The sweep's keys.
        folder: The sweep's folder.
        fixed: Keys that are the same for all jobs.
    """

    def __init__(self, settings: SweepSettings, folder: Path, fixed: Sequence[str]) -> None:
        self._settings = settings
        self._folder = folder
        self._fixed = fixed
        self._results: list[Result] = []
        self._runner = Runner(
            torchrun(settings, Path(settings.script or sys.argv[0])),
            parallel=settings.parallel,
            minutes=settings.minutes,
            grace_seconds=settings.grace_seconds,
            # This process has its own reason to set it.
            environment={"HYDRA_FULL_ERROR": hydra_entry.user_hydra_full_error or ""},
        )

    @classmethod
    def of(cls, settings: SweepSettings, folder: str, typed: Sequence[str]) -> Sweep:
        """The sweep of a command line.

        Args:
            settings: The sweep's keys.
            folder: The sweep's folder.
            typed: The trainings' settings as the user typed them, with Hydra's syntax for sweeps.
        """
        overrides = OverridesParser.create().parse_overrides(list(typed))
        fixed = [override.get_key_element() for override in overrides if not override.is_sweep_override()]
        return cls(settings, Path(folder).resolve(), fixed)

    def run(self, overrides: Sequence[Sequence[str]], first: int) -> list[Result]:
        """Runs jobs, then prints the table and writes ``results.csv`` of all that ran so far.

        Args:
            overrides: Each job's settings.
            first: The first job's number.

        Raises:
            ConfigError: The folder holds another sweep whose jobs would be listed.
            SystemExit: The process was asked to end, or only a list of jobs was wanted.
        """
        jobs = make_jobs(overrides, first, self._fixed, self._folder)
        if self._settings.jobs_file is not None:
            taken = [job for job in jobs if not job.claim()]
            if taken:
                raise ConfigError("sweep.folder", self._folder, f"{taken[0].name} in it has other settings")
            Path(self._settings.jobs_file).write_text(lines(jobs))
            print(f"{self._settings.jobs_file}: {len(jobs)} jobs, one a line")
            sys.exit(0)
        results, code = self._runner.run(jobs)
        self._results += results
        print(table.to_text(self._results, self._settings.metric), flush=True)
        target = self._folder / "results.csv"
        target.write_text(table.to_csv(self._results))
        print(f"{target}; curves and HParams: tensorboard --logdir {self._folder}", flush=True)
        if code:
            sys.exit(code)
        return results

    def metric(self, result: Result) -> float | None:
        """The number that ranks a job, if it has one."""
        return table.number(result, self._settings.metric) if result.status == DONE else None


def arguments(given: Sequence[str], script: Path, folder: str) -> list[str]:
    """A command line of ``launch/sweep.py`` as Hydra's ``--multirun`` takes it.

    ``nproc`` and ``sweep.…`` are the launcher's, ``sweep.folder`` is Hydra's folder of the sweep, and all the rest is
    the trainings'.

    Args:
        given: What the user typed.
        script: What each job runs.
        folder: The sweep's folder where the user names none.

    Raises:
        ConfigError: ``sweep.…`` is no key of a sweep.
    """
    known = ["folder", *(field.name for field in dataclasses.fields(SweepSettings))]
    found = ["--multirun", "hydra/launcher=torchrun", f"hydra.launcher.script={quoted(str(script))}"]
    found.append(f"hydra.sweep.dir={quoted(folder)}")
    for argument in given:
        key, _, value = argument.partition("=")
        if key == "sweep.folder":
            found.append(f"hydra.sweep.dir={value}")
        elif key.startswith("sweep."):
            if key.removeprefix("sweep.") not in known:
                raise config_error(key, "no such key", [f"sweep.{name}" for name in known])
            found.append(f"hydra.launcher.{argument.removeprefix('sweep.')}")
        elif key == "nproc":
            found.append(f"hydra.launcher.{argument}")
        else:
            found.append(argument)
    return found
