"""What all loggers have in common. The base class discards everything; ranks that must not write use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from distrain.config.groups import LoggerConfig
from distrain.config.registry import register
from distrain.runtime.run_owner import RunOwner

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Scalars = Mapping[str, float]


@register("logger", "none", LoggerConfig)
class Logger:
    """Discards everything it is given; the base class of all loggers.

    Args:
        config: The logger's keys.
        run_dir: The run's folder.

    Attributes:
        accepts_figures: Whether it stores figures; if not, the caller need not draw them.
        owner: This start as the owner of the run's folder; ``None`` outside a run.
    """

    accepts_figures: bool = False
    owner: RunOwner | None = None

    def __init__(self, config: LoggerConfig | None = None, run_dir: Path | None = None) -> None:
        self.config = config

    def may_create(self) -> bool:
        """Whether the run's folder belongs to this start, so that a file that was removed may be made anew."""
        return self.owner is None or self.owner.may_write

    def scalars(self, step: int, values: Scalars, *, kind: str = "step") -> None:
        """Logs named numbers.

        Args:
            step: Number of updates so far.
            values: Values by name; related values are named ``group/name``.
            kind: ``step``, or ``epoch`` for values that describe a whole epoch.
        """

    def figure(self, step: int, name: str, figure: Figure) -> None:
        """Logs a figure."""

    def histogram(self, step: int, name: str, counts: Sequence[int], edges: Sequence[float]) -> None:
        """Logs how often values lie between neighbouring edges; there is one edge more than there are counts."""

    def begin(self, parameters: Mapping[str, Any]) -> None:
        """Logs the run's configuration when training begins, or goes on; called after :meth:`rewind`."""

    def hyperparameters(self, parameters: Mapping[str, Any], metrics: Scalars) -> None:
        """Logs the run's configuration together with its final metrics, at the end of a run that was not stopped."""

    def rewind(self, step: int, *, mid_epoch: bool) -> None:
        """Removes what was logged after a step and at the end of the run, since the run is resumed from that step.

        Args:
            step: Number of updates in the checkpoint that the run is resumed from. What was logged at this step is
                kept, since logging comes before saving.
            mid_epoch: Whether the checkpoint was saved before the end of its epoch. If so, the values of that epoch are
                removed too, since they will be logged again.
        """

    def flush(self) -> None:
        """Writes buffered values; called before a checkpoint is saved, which must not be newer than the logs."""

    def close(self) -> None:
        """Flushes and closes; nothing may be logged afterwards."""

    def fail(self) -> None:
        """Closes at the end of a run that fails, which must not wait for long."""
        self.close()


class InMemoryLogger(Logger):
    """Stores everything in lists, for tests and notebooks.

    Attributes:
        rows: Logged numbers, in order, each with ``kind`` and ``step``.
        figures: Step and name of each figure.
        final: The final metrics.
    """

    accepts_figures = True

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, Any]] = []
        self.figures: list[tuple[int, str]] = []
        self.final: dict[str, float] = {}

    @override
    def scalars(self, step: int, values: Scalars, *, kind: str = "step") -> None:
        self.rows.append({"kind": kind, "step": step, **values})

    @override
    def figure(self, step: int, name: str, figure: Figure) -> None:
        self.figures.append((step, name))

    @override
    def hyperparameters(self, parameters: Mapping[str, Any], metrics: Scalars) -> None:
        self.final = dict(metrics)


def is_kept(row_step: int, kind: str, step: int, *, mid_epoch: bool) -> bool:
    """Whether a logged row stays when a run is resumed.

    Args:
        row_step: The row's step.
        kind: The row's kind.
        step: As for :meth:`Logger.rewind`.
        mid_epoch: Likewise.
    """
    return row_step < step or (row_step == step and not (kind == "epoch" and mid_epoch))
