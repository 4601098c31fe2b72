"""Hydra's ``hydra/launcher=torchrun``: each job of a ``--multirun`` under a torchrun of its own.

Hydra takes launchers from packages below ``hydra_plugins`` only, and imports all of them whenever it starts, so what
the launcher does lies in :mod:`distrain.tools.launching` and is imported when it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from distrain.tools.launching.jobs import Result


class TorchrunLauncher(Launcher):
    """Runs jobs as processes of this host.

    Args:
        **settings: Keys of ``conf/hydra/launcher/torchrun.yaml``.
    """

    def __init__(self, **settings: Any) -> None:
        self._settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before the first jobs.

        Raises:
            ConfigError: A key's value is wrong.
        """
        from distrain.cli import sweep
        from distrain.config.load import load_settings

        settings = load_settings(sweep.SweepSettings, OmegaConf.create(self._settings))
        self._sweep = sweep.Sweep.of(settings, config.hydra.sweep.dir, config.hydra.overrides.task)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Runs some jobs; called again by sweepers that choose the next ones by what these came to."""
        return [
            _JobReturn(result, self._sweep.metric(result)) for result in self._sweep.run(job_overrides, initial_job_idx)
        ]


class _JobReturn(JobReturn):
    """A job's number for Hydra's sweeper, or an exception where it has none; all was said about it already."""

    def __init__(self, result: Result, metric: float | None) -> None:
        super().__init__(overrides=list(result.job.overrides), working_dir=str(result.job.folder))
        self.status = JobStatus.FAILED if metric is None else JobStatus.COMPLETED
        self._return_value = metric

    @property
    def return_value(self) -> Any:
        if self.status == JobStatus.FAILED:
            from distrain.cli.hydra_entry import Ended

            raise Ended(1)
        return self._return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value
