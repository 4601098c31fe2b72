"""``distrain sweep``: many trainings, one for each combination of values, and one table of their results.

Hydra's sweeper composes the combinations and hands them to the launcher in ``hydra_plugins``, which calls
:meth:`Sweep.run`. Each job trains under a torchrun of its own.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser

from distrain.cli import hydra_entry
from distrain.config.setting import setting
from distrain.errors import ConfigError, config_error
from distrain.files.contained_folder import ContainedFolder, UnsafePath
from distrain.files.terminal import print_to_stderr, show
from distrain.runtime import program
from distrain.tools.launching import table
from distrain.tools.launching.jobs import DONE, JobResult, JobRunner, hydra_quote, job_array_lines, make_jobs


@dataclass
class SweepSettings:
    """Keys of ``conf/hydra/launcher/torchrun.yaml``."""

    nproc: str = setting("Ranks per job: a number, or torchrun's gpu, cpu or auto.")
    minutes: float | None = setting("A job that takes longer is ended; null: no limit.", above=0)
    parallel: int = setting("How many jobs run at a time.", at_least=1)
    metric: str = setting("The number of summary.json that ranks the jobs and that Optuna optimizes.")
    grace_seconds: float = setting("Seconds that a job has to save before it is killed.", at_least=0)
    torchrun: list[str] = setting("More options for torchrun.")
    script: str | None = setting("The script that each job runs; null: distrain train.", path=True)
    jobs_file: str | None = setting("Write one line per job to this file and run none; null: run them.", path=True)


def torchrun_command(settings: SweepSettings) -> list[str]:
    """Returns a job's command without arguments.

    Each torchrun takes a free port, at an address that needs no name service.
    """
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"),
        *("--nproc-per-node", settings.nproc),
        *settings.torchrun,
        *([settings.script] if settings.script else program.starting("train")),
    ]


class Sweep:
    """The jobs of a sweep, as Hydra's sweeper hands them over, and their results so far.

    Args:
        settings: The sweep's keys.
        folder: The sweep's folder.
        fixed: Keys that are the same for all jobs.
        options: What stands in front of the settings of each job, such as ``--config-dir DIR``.
    """

    def __init__(self, settings: SweepSettings, folder: Path, fixed: Sequence[str], options: Sequence[str]) -> None:
        self._settings = settings
        self._folder = folder
        self._fixed = fixed
        self._options = options
        self._results: list[JobResult] = []
        self._runner = JobRunner(
            torchrun_command(settings),
            parallel=settings.parallel,
            minutes=settings.minutes,
            grace_seconds=settings.grace_seconds,
            # hydra_entry.main changed it in this process.
            environment={"HYDRA_FULL_ERROR": hydra_entry.user_hydra_full_error or ""},
        )

    @classmethod
    def from_command_line(
        cls, settings: SweepSettings, folder: str, overrides: Sequence[str], config_folders: Sequence[str]
    ) -> Sweep:
        """Makes the sweep of a command line.

        Args:
            settings: The sweep's keys.
            folder: The sweep's folder.
            overrides: The trainings' settings as the user typed them, with Hydra's syntax for sweeps.
            config_folders: The folders that ``--config-dir`` names.
        """
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        fixed = [override.get_key_element() for override in parsed if not override.is_sweep_override()]
        options = [word for name in config_folders for word in ("--config-dir", name)]
        return cls(settings, Path(folder).resolve(), fixed, options)

    def run(self, overrides: Sequence[Sequence[str]], first: int) -> list[JobResult]:
        """Runs jobs, then prints the table and writes ``results.csv``, with all results so far.

        Args:
            overrides: The settings of each job.
            first: Number of the first job.

        Raises:
            ConfigError: Jobs should be listed, but the folder holds another sweep.
            SystemExit: The process was asked to end, or jobs were only listed.
        """
        jobs = make_jobs(overrides, first, self._fixed, self._folder, self._options)
        if self._settings.jobs_file is not None:
            try:
                conflicting = [job for job in jobs if not job.claim_folder()]
            except UnsafePath as error:
                problem = f"{error.filename} {error.strerror}; remove it, or name another folder"
                raise ConfigError("sweep.folder", self._folder, problem) from error
            if conflicting:
                raise ConfigError("sweep.folder", self._folder, f"{conflicting[0].name} in it has other settings")
            Path(self._settings.jobs_file).write_text(job_array_lines(jobs))
            show(f"{self._settings.jobs_file}: {len(jobs)} jobs, one per line")
            sys.exit(0)
        results, code = self._runner.run(jobs)
        self._results += results
        show(table.to_text(self._results, self._settings.metric))
        without = [result for result in results if result.status == DONE and self.metric(result) is None]
        if without:
            # Hydra's sweeper needs the number, so the sweep ends with exit code 1.
            print_to_stderr(f"distrain: {no_metric(self._settings.metric, without)}")
        target = self._folder / "results.csv"
        try:
            ContainedFolder(self._folder).replace_text(target.name, table.to_csv(self._results))
        except UnsafePath as error:
            print_to_stderr(f"distrain: {target} is not written, since it {error.strerror}")
        show(f"{target}; curves and HParams: tensorboard --logdir {self._folder}")
        if code:
            sys.exit(code)
        return results

    def metric(self, result: JobResult) -> float | None:
        """Returns the number that ranks a job; ``None`` if it is not done or lacks the number."""
        return table.summary_number(result, self._settings.metric) if result.status == DONE else None


def no_metric(metric: str, results: Sequence[JobResult]) -> str:
    """What is wrong with jobs that are done and lack the number by which jobs are ranked, and what they have instead.

    Args:
        metric: The number's name in ``summary.json``.
        results: The jobs, at least one.
    """
    first = results[0]
    scores = [name for name in first.summary if name.startswith(("val_", "test_", "train_"))]
    numbers = [name for name in scores if table.summary_number(first, name) is not None]
    why = " (no validation without an epoch's end, or with data.val_fraction=0)" if metric.startswith("val_") else ""
    names = ", ".join(result.job.name for result in results)
    return str(
        ConfigError(
            "sweep.metric", metric, f"is no number in the summary.json of {names}{why}, so the sweep fails", numbers
        )
    )


def multirun_arguments(arguments: Sequence[str], default_folder: str) -> list[str]:
    """Translates a command line of ``distrain sweep`` into one of Hydra's ``--multirun``.

    ``nproc`` and ``sweep.…`` become keys of the launcher, ``sweep.folder`` becomes Hydra's folder of the sweep, and
    everything else is passed on to the trainings.

    Args:
        arguments: What the user typed.
        default_folder: The sweep's folder if the user names none.

    Raises:
        ConfigError: An unknown key ``sweep.…``.
    """
    known = ["folder", *(field.name for field in dataclasses.fields(SweepSettings))]
    translated = ["--multirun", "hydra/launcher=torchrun", f"hydra.sweep.dir={hydra_quote(default_folder)}"]
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key == "sweep.folder":
            # Hydra's own key, which no schema expands.
            value = hydra_quote(str(Path(value).expanduser())) if value.startswith("~") else value
            translated.append(f"hydra.sweep.dir={value}")
        elif key.startswith("sweep."):
            if key.removeprefix("sweep.") not in known:
                raise config_error(key, "no such key", [f"sweep.{name}" for name in known])
            translated.append(f"hydra.launcher.{argument.removeprefix('sweep.')}")
        elif key == "nproc":
            translated.append(f"hydra.launcher.{argument}")
        else:
            translated.append(argument)
    return translated
