r"""Trains with each combination of values: ``python launch/sweep.py strategy=ddp nproc=2 compression=none,fp16``.

Values are separated by commas, or written range(1,5), choice(a,b), glob(*): Hydra's syntax of ``--multirun``. Every
combination is a job of its own, under its own torchrun, in its own folder; one that fails or hangs doesn't stop the
rest. nproc and sweep.* are the sweep's, everything else is launch/train.py's:

  nproc=2               ranks a job
  sweep.minutes=30      a job that takes longer is ended
  sweep.parallel=2      jobs at a time
  sweep.metric=test_accuracy    which number of summary.json ranks the jobs (val_accuracy)
  sweep.folder=DIR      where the jobs' folders and results.csv go (outputs/DATE/TIME_sweep); the same command with the
                        folder of a sweep that was stopped runs what is missing
  sweep.jobs_file=FILE  write one line a job, for launch/slurm/train.sbatch, and run none

  python launch/sweep.py hydra/sweeper=optuna hydra.sweeper.direction=maximize hydra.sweeper.n_trials=20 \
      'optimizer.lr=tag(log,interval(0.0001,0.1))'      lets Optuna choose (pip install 'distrain[optuna]')
"""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

from omegaconf import DictConfig

from distrain.cli import hydra_entry, sweep
from distrain.errors import ConfigError

HERE = Path(__file__).resolve().parent


def task(composed: DictConfig) -> None:
    """Never called: the launcher starts launch/train.py for each job."""
    raise AssertionError(composed)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        sys.exit()
    folder = f"outputs/{datetime.datetime.now():%Y-%m-%d/%H-%M-%S}_sweep"
    try:
        sys.argv[1:] = sweep.arguments(sys.argv[1:], HERE / "train.py", folder)
    except ConfigError as error:
        hydra_entry.refuse(error)
    hydra_entry.main(task, HERE.parent / "conf", "config")
