"""Measures the first steps of a run: warm-up, ordinary steps, and steps whose exchanges are held back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from typing_extensions import override

from distrain.compression.autotune.simulation import ComputeTimes
from distrain.compression.autotune.step_trace import StepRecorder, StepTrace
from distrain.compression.base import Compressor

ORDINARY, HELD = "ordinary", "held"


def _do_nothing(label: str) -> None:
    pass


@dataclass(frozen=True)
class Phase:
    """Consecutive steps of a probe.

    Attributes:
        labels: Label of each step.
        evaluate: Called after the last step with the traces of the phase; returns the next phase, or ``None`` to end
            the probe. A step in which nothing was exchanged has no trace.
        held_label: Steps with this label hold their exchanges back until the backward pass has ended.
        prepare: Called before each step with its label.
    """

    labels: Sequence[str]
    evaluate: Callable[[list[StepTrace]], Phase | None]
    held_label: str | None = None
    prepare: Callable[[str], None] = _do_nothing


class StepProbe(StepRecorder, ABC):
    """Observes a compressor's steps in phases and detaches itself after the last one; all ranks run it alike.

    After the warm-up come ordinary steps and steps whose exchanges are held back, which show the backward pass without
    communication. :meth:`evaluate` then decides how to continue.

    Args:
        compressor: The observed compressor; the caller sets its ``observer``.
        ordinary_steps: Number of ordinary steps.
        held_steps: Number of steps whose exchanges are held back.
    """

    def __init__(self, compressor: Compressor, ordinary_steps: int, held_steps: int) -> None:
        super().__init__()
        self.compressor = compressor
        self._ordinary_steps, self._held_steps = ordinary_steps, held_steps
        self._begin()

    def _begin(self) -> None:
        self._ordinary: list[StepTrace] = []
        self._phase: Phase | None = Phase([ORDINARY] * self._ordinary_steps, self._end_ordinary)
        self._steps_of_phase = 0
        self._warm = False

    @override
    def buckets_change(self) -> None:
        """Begins again with the warm-up."""
        self.holds_exchanges = False
        self._open = None
        self.traces.clear()
        self._begin()

    @abstractmethod
    def is_warm(self) -> bool:
        """Whether measuring may begin; asked once before each step until it is true, and equal on all ranks."""

    @abstractmethod
    def evaluate(self, ordinary: list[StepTrace], held: list[StepTrace]) -> Phase | None:
        """Evaluates the ordinary and the held steps.

        Returns:
            The next phase; ``None`` ends the probe.
        """

    @override
    def begin_step(self) -> None:
        self.close_step()
        if not self._warm:
            self._warm = self.is_warm()
            if not self._warm:
                self.open_step()
                return
            self.traces.clear()
        if self._phase is not None and self._steps_of_phase == len(self._phase.labels):
            self._phase, self._steps_of_phase = self._phase.evaluate(self.take_traces()), 0
        if self._phase is None:
            self.detach()
            return
        label = self._phase.labels[self._steps_of_phase]
        self._steps_of_phase += 1
        self.holds_exchanges = label == self._phase.held_label
        self._phase.prepare(label)
        self.open_step(label)

    def detach(self) -> None:
        """Ends the observation."""
        self.holds_exchanges = False
        self.compressor.observer = None

    def prepare_held_step(self) -> None:
        """Called before each step whose exchanges are held back."""

    def gather_compute_times(
        self, held: Sequence[StepTrace], own: Mapping[str, Any]
    ) -> tuple[list[list[ComputeTimes]], list[dict[str, Any]]]:
        """Exchanges measurements among the ranks.

        Args:
            held: This rank's steps with exchanges held back.
            own: More plain data of this rank.

        Returns:
            For each rank the compute times of those steps, and each rank's ``own``.
        """
        mine = {**own, "compute": [asdict(ComputeTimes.of(trace)) for trace in held]}
        gathered = self.communicator.all_gather_json(mine, self.device)
        return [[ComputeTimes(**times) for times in each.pop("compute")] for each in gathered], gathered

    def _end_ordinary(self, traces: list[StepTrace]) -> Phase:
        self._ordinary = traces
        return Phase([HELD] * self._held_steps, self._end_held, HELD, lambda _: self.prepare_held_step())

    def _end_held(self, traces: list[StepTrace]) -> Phase | None:
        return self.evaluate(self._ordinary, traces)


def slowest(gathered: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """Each step's seconds on the rank where they were longest.

    Args:
        gathered: Each rank's data.
        key: Names the list of seconds, one value per step.
    """
    return [max(seconds) for seconds in zip(*(each[key] for each in gathered), strict=True)]
