"""``logger=[csv,tensorboard]``: several loggers at once, and the loggers of a run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from distrain.config.groups import LoggerConfig
from distrain.config.registry import choice, register
from distrain.config.schema import Config
from distrain.config.setting import setting
from distrain.errors import ConfigError, TakenOver
from distrain.reporting.loggers.base import Logger, Scalars
from distrain.reporting.loggers.metrics_file import MetricsFile
from distrain.runtime.run_owner import RunOwner

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)


@dataclass
class SeveralConfig(LoggerConfig):
    """Keys of ``logger=several``, which ``logger=[csv,tensorboard]`` stands for."""

    loggers: dict[str, Any] = setting("The loggers, by their names.", choices_of="logger")

    def __post_init__(self) -> None:
        """Refuses a list in a list.

        Raises:
            ConfigError: It names the logger.
        """
        for name, inner in self.loggers.items():
            kind = inner.get("name") if isinstance(inner, Mapping) else inner.name
            if kind == "several":
                raise ConfigError(f"logger.loggers.{name}.name", kind, "can't be one of several")

    @override
    def check(self) -> None:
        for inner in self.loggers.values():
            inner.check()


@register("logger", "several", SeveralConfig)
class Loggers(Logger):
    """Several loggers at once: everything is passed on to each of them.

    The run continues if one of them can't write (a full disk, say). What such a logger can't write it keeps for later,
    as far as it can. An error is logged at its first failed call, and again if it fails after a call that succeeded.

    Args:
        loggers: Where to pass calls on to.
        owner: This start as the owner of the run's folder. Every call checks it, and raises ``TakenOver`` instead of
            writing into a folder that another start of the run has taken.
    """

    def __init__(self, loggers: Sequence[Logger], owner: RunOwner | None = None) -> None:
        super().__init__()
        self.owner = owner
        self._loggers = list(loggers)
        self.accepts_figures = any(logger.accepts_figures for logger in self._loggers)
        self._failing: set[Logger] = set()
        self._closed = False

    @override
    def scalars(self, step: int, values: Scalars, *, kind: str = "step") -> None:
        self._call_each(lambda logger: logger.scalars(step, values, kind=kind))

    @override
    def figure(self, step: int, name: str, figure: Figure) -> None:
        self._call_each(lambda logger: logger.figure(step, name, figure))

    @override
    def hyperparameters(self, parameters: Mapping[str, Any], metrics: Scalars) -> None:
        self._call_each(lambda logger: logger.hyperparameters(parameters, metrics))

    @override
    def histogram(self, step: int, name: str, counts: Sequence[int], edges: Sequence[float]) -> None:
        self._call_each(lambda logger: logger.histogram(step, name, counts, edges))

    @override
    def begin(self, parameters: Mapping[str, Any]) -> None:
        self._call_each(lambda logger: logger.begin(parameters))

    @override
    def rewind(self, step: int, *, mid_epoch: bool) -> None:
        self._call_each(lambda logger: logger.rewind(step, mid_epoch=mid_epoch))

    @override
    def flush(self) -> None:
        self._call_each(lambda logger: logger.flush())

    @override
    def close(self) -> None:
        self._closed = True
        self._call_each(lambda logger: logger.close())

    @override
    def fail(self) -> None:
        if self._closed:
            return
        self._closed = True
        # The run's own error is what must be told.
        with contextlib.suppress(TakenOver):
            self._call_each(lambda logger: logger.fail())

    def _call_each(self, call: Callable[[Logger], None]) -> None:
        if self.owner is not None:
            self.owner.check()
        for logger in self._loggers:
            logger.owner = self.owner
            try:
                call(logger)
            except OSError as error:
                if logger not in self._failing:
                    log.error("METRICS NOT WRITTEN: %s can't write (%s). The run goes on", type(logger).__name__, error)
                self._failing.add(logger)
            else:
                self._failing.discard(logger)


def build(config: Config, run_dir: Path, owner: RunOwner | None = None) -> Logger:
    """Builds the loggers of the rank that writes: ``metrics.jsonl`` and those that are configured.

    Args:
        config: The run's configuration.
        run_dir: The run's folder.
        owner: This start as the owner of the folder.
    """
    chosen = config.logger
    configs = list(chosen.loggers.values()) if isinstance(chosen, SeveralConfig) else [chosen]
    built: list[Logger] = [choice("logger", each.name).target(each, run_dir) for each in configs]
    # First, since others complete their record from this file when a run is resumed.
    return Loggers([MetricsFile(run_dir / MetricsFile.NAME), *built], owner)
