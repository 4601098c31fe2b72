r"""Trains with each combination of values: ``distrain sweep strategy=ddp nproc=2 compression=none,fp16``.

Values are separated by commas, or written as range(1,5), choice(a,b) or glob(*): Hydra's syntax of ``--multirun``. Each
combination is a job: a training under its own torchrun, in its own folder. A job that fails or hangs does not stop the
others. nproc and sweep.* belong to the sweep, all other settings to the trainings:

  nproc=2               ranks per job
  sweep.minutes=30      ends a job that takes longer
  sweep.parallel=2      number of jobs that run at a time
  sweep.metric=test_accuracy    the number of summary.json that ranks the jobs (val_accuracy)
  sweep.folder=DIR      folder of the jobs' folders and results.csv (outputs/DATE/TIME_sweep); with the folder of a
                        sweep that was stopped, the same command runs the missing jobs
  sweep.jobs_file=FILE  writes one line per job, for launch/slurm/train.sbatch, and runs none

  distrain sweep hydra/sweeper=optuna hydra.sweeper.direction=maximize hydra.sweeper.n_trials=20 \
      'optimizer.lr=tag(log,interval(0.0001,0.1))'      lets Optuna choose the values (pip install 'distrain[optuna]')
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Sequence

from omegaconf import DictConfig

from distrain.cli import hydra_entry, sweep
from distrain.cli.typed_help import as_started
from distrain.config.folder import CONF
from distrain.errors import ConfigError


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        arguments: The command line behind the command's name; ``None``: that of this process.
    """
    hydra_entry.set_arguments(arguments)
    if {"-h", "--help"} & set(sys.argv[1:]):
        if len(sys.argv) == 2:
            print(as_started(__doc__ or ""))
        else:
            # Asks about a key of the trainings.
            hydra_entry.main(_task, CONF, "config")
        return
    folder = f"outputs/{datetime.datetime.now():%Y-%m-%d/%H-%M-%S}_sweep"
    try:
        sys.argv[1:] = sweep.multirun_arguments(sys.argv[1:], folder)
    except ConfigError as error:
        hydra_entry.exit_refused(error)
    hydra_entry.main(_task, CONF, "config")


def _task(composed: DictConfig) -> None:
    """Never called: the launcher starts ``distrain train`` for each job."""
    raise AssertionError(composed)
