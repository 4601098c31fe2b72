"""What ``status.json`` of a run's folder holds: where each rank is now, and what was logged last.

Rank 0 writes it about once a second for whoever looks at the run from outside. A reader may get the file from a
stranger, so every field is checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from distrain.files.untrusted import UnreadableFile, finite_number
from distrain.health.process import PlacedProcess, Process

#: Name of the file in a run's folder.
STATUS_FILE = "status.json"
#: Larger files are not read; one of 5,000 ranks has 900 kB.
MAX_STATUS_BYTES = 1 << 22

_LARGEST_NUMBER = 1 << 53
_LONGEST_TEXT = 300
_MOST_VALUES = 1000


@dataclass(frozen=True)
class RankStatus:
    """Where a rank is, as rank 0 knows it.

    Attributes:
        rank: The rank.
        host: Name of its host.
        phase: What it is doing; see :class:`~distrain.health.activity.RankActivity`.
        step: Optimizer updates done.
        steps_per_second: Its speed over the last seconds.
        idle_seconds: Time since it last made progress.
        silent_seconds: Time since its last heartbeat.
        has_left: It has ended in an orderly way, or its process is gone.
        place: Its number along each dimension of the mesh; empty where the ranks have one dimension.
    """

    rank: int
    host: str
    phase: str
    step: int
    steps_per_second: float
    idle_seconds: float
    silent_seconds: float
    has_left: bool
    place: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class RunStatus:
    """Where a run is.

    Attributes:
        number: Grows with each writing of the file.
        time: When it was written, in seconds since the epoch by the clock of rank 0's host.
        started: When this start of the run began, likewise.
        running: Whether rank 0 goes on; false in the last writing before it ends.
        host: Name of rank 0's host.
        writer: Rank 0's process.
        ranks: Each rank.
        step_limit: Seconds without progress after which a run of several ranks ends by itself.
        setup_limit: The same before the first step and after the last one.
        epoch: Epochs that have ended.
        epochs: Epochs of the whole run; 0 before training begins, as are the following four.
        step: Optimizer updates done.
        total_steps: Those of the whole run.
        first_step: Those that this start of the run has found done.
        training_seconds: Time since this start has begun to train.
        compiles: The first step compiles the model.
        values: What was logged last of steps, by name, as in ``metrics.jsonl``; ``None`` for what is not finite.
        epoch_values: What was logged at the end of the last epoch, likewise.
    """

    number: int
    time: float
    started: float
    running: bool
    host: str
    writer: PlacedProcess
    ranks: list[RankStatus]
    step_limit: float
    setup_limit: float
    epoch: int = 0
    epochs: int = 0
    step: int = 0
    total_steps: int = 0
    first_step: int = 0
    training_seconds: float = 0.0
    compiles: bool = False
    values: dict[str, float | None] = field(default_factory=dict)
    epoch_values: dict[str, float | None] = field(default_factory=dict)

    @property
    def phase(self) -> str:
        """What most ranks are doing, as it is shown to users."""
        phases = [self.phase_of(rank) for rank in self.ranks if not rank.has_left]
        return max(phases, key=phases.count) if phases else ""

    def phase_of(self, rank: RankStatus) -> str:
        """What a rank is doing, as it is shown to users."""
        return shown_phase(rank.phase, compiles=self.compiles and rank.step == self.first_step)

    @property
    def seconds_left(self) -> float | None:
        """Time until the last step; ``None`` if it is unknown."""
        return seconds_left(self.training_seconds, self.step - self.first_step, self.total_steps - self.step)

    def to_json(self) -> dict[str, Any]:
        """The content of the file."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> RunStatus:
        """Checks the content of a file.

        Raises:
            UnreadableFile: A field is missing, or is not what it should be.
        """
        read = _Fields(content)
        place = read.inner("writer")
        process = place.inner("process")
        started = None if process.content.get("started") is None else process.integer("started")
        return cls(
            read.integer("number"),
            read.number("time"),
            read.number("started"),
            read.flag("running"),
            read.text("host"),
            PlacedProcess(Process(process.integer("pid"), started), place.text("boot"), place.text("namespace")),
            [
                RankStatus(
                    each.integer("rank"),
                    each.text("host"),
                    each.text("phase"),
                    each.integer("step"),
                    each.number("steps_per_second"),
                    each.number("idle_seconds"),
                    each.number("silent_seconds"),
                    each.flag("has_left"),
                    each.integers("place"),
                )
                for each in read.list("ranks")
            ],
            read.number("step_limit"),
            read.number("setup_limit"),
            epoch=read.integer("epoch"),
            epochs=read.integer("epochs"),
            step=read.integer("step"),
            total_steps=read.integer("total_steps"),
            first_step=read.integer("first_step"),
            training_seconds=read.number("training_seconds"),
            compiles=read.flag("compiles"),
            values=read.values("values"),
            epoch_values=read.values("epoch_values"),
        )


#: How phases are called for users.
_SHOWN_PHASES = {
    "": "starting",
    "set-up": "setting up",
    "training": "training",
    "evaluation": "evaluating",
    "saving": "saving",
    "finishing": "finishing",
    "serving": "serving",
}


def shown_phase(phase: str, *, compiles: bool) -> str:
    """What a rank is doing, for users.

    Args:
        phase: As in :class:`RankStatus`.
        compiles: If it trains, this step compiles the model.
    """
    return "compiling" if compiles and phase == "training" else _SHOWN_PHASES.get(phase, phase)


def seconds_left(seconds: float, done: int, left: int) -> float | None:
    """Time that the steps left will take if each takes as long as those done took; ``None`` before the first."""
    return seconds / done * max(left, 0) if done > 0 else None


class _Fields:
    """The fields of a JSON object, each of which must have its type.

    Args:
        content: The object.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = content

    def integer(self, name: str) -> int:
        value = self.content.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _LARGEST_NUMBER:
            raise _wrong(name)
        return value

    def number(self, name: str) -> float:
        value = finite_number(self.content.get(name))
        if value is None or not 0 <= value < _LARGEST_NUMBER:
            raise _wrong(name)
        return value

    def flag(self, name: str) -> bool:
        value = self.content.get(name)
        if not isinstance(value, bool):
            raise _wrong(name)
        return value

    def text(self, name: str) -> str:
        value = self.content.get(name)
        if not isinstance(value, str):
            raise _wrong(name)
        return value[:_LONGEST_TEXT]

    def inner(self, name: str) -> _Fields:
        value = self.content.get(name)
        if not isinstance(value, dict):
            raise _wrong(name)
        return _Fields(value)

    def integers(self, name: str) -> dict[str, int]:
        """Whole numbers by name; none where an older run has no such field."""
        if name not in self.content:
            return {}
        inner = self.inner(name)
        if len(inner.content) > _MOST_VALUES:
            raise _wrong(name)
        return {key[:_LONGEST_TEXT]: inner.integer(key) for key in inner.content}

    def list(self, name: str) -> list[_Fields]:
        values = self.content.get(name)
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise _wrong(name)
        return [_Fields(value) for value in values]

    def values(self, name: str) -> dict[str, float | None]:
        content = self.inner(name).content
        if len(content) > _MOST_VALUES:
            raise _wrong(name)
        return {key[:_LONGEST_TEXT]: finite_number(value) for key, value in content.items()}


def _wrong(name: str) -> UnreadableFile:
    return UnreadableFile(f"{STATUS_FILE} has no valid {name}")
