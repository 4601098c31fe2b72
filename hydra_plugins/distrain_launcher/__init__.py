"""Hydra's ``hydra/launcher=torchrun``: runs each job of a ``--multirun`` under a torchrun of its own.

Hydra finds launchers only in packages below ``hydra_plugins`` and imports all of them whenever it starts. Therefore the
work is done in :mod:`distrain.cli.sweep`, which is imported only when the launcher is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from distrain.tools.launching.jobs import JobResult


class TorchrunLauncher(Launcher):
    """Runs jobs as processes of this host.

    Args:
        **settings: Keys of ``conf/hydra/launcher/torchrun.yaml``.
    """

    def __init__(self, **settings: Any) -> None:
        self._settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Prepares the sweep; Hydra calls this once before the first jobs.

        Raises:
            ConfigError: The value of a key is wrong.
        """
        from distrain.cli import sweep
        from distrain.config.load import load_settings

        settings = load_settings(sweep.SweepSettings, OmegaConf.create(self._settings))
        sources = config.hydra.runtime.config_sources
        self._sweep = sweep.Sweep.from_command_line(
            settings,
            config.hydra.sweep.dir,
            config.hydra.overrides.task,
            # Hydra's name for --config-dir.
            [source.path for source in sources if source.provider == "command-line"],
        )

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Runs some jobs; sweepers that choose new values by earlier results call this several times."""
        return [
            _JobReturn(result, self._sweep.metric(result)) for result in self._sweep.run(job_overrides, initial_job_idx)
        ]


class _JobReturn(JobReturn):
    """A job's metric for Hydra's sweeper; reading it raises an exception if the job has none.

    The job's failure has already been printed, so the exception only sets the exit code.
    """

    def __init__(self, result: JobResult, metric: float | None) -> None:
        super().__init__(overrides=list(result.job.overrides), working_dir=str(result.job.folder))
        self.status = JobStatus.FAILED if metric is None else JobStatus.COMPLETED
        self._return_value = metric

    @property
    def return_value(self) -> Any:
        if self.status == JobStatus.FAILED:
            from distrain.cli.hydra_entry import ExitWithCode
            from distrain.errors import EXIT_FAILED

            raise ExitWithCode(EXIT_FAILED)
        return self._return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value
