"""Where a model that is no sequence may be cut: a few places where little crosses, named after what begins there."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from distrain.errors import ConfigError
from distrain.strategies.pipeline.layout import Line

#: A cut is left out if another one hands over less within this share of a stage's work.
_SHARE_OF_STAGE = 1 / 16


@dataclass(frozen=True)
class Cut:
    """A place where one part of a model may end and the next one begin.

    Attributes:
        name: What begins there.
        training: Index of the first call behind it, in training mode.
        evaluation: Likewise in evaluation mode.
        bytes: What crosses of one sample.
        depth: In how many opened modules it lies.
    """

    name: str
    training: int
    evaluation: int
    bytes: int
    depth: int


class CutFinder:
    """Finds the cuts of a model.

    Args:
        training: The calls in training mode.
        evaluation: The calls in evaluation mode.
    """

    def __init__(self, training: Line, evaluation: Line) -> None:
        self._training, self._evaluation = training, evaluation
        self._same = {key: index for index, key in enumerate(evaluation.keys)}
        self._done = [0.0]
        for work in training.work:
            self._done.append(self._done[-1] + work)
        #: Why the model can't be cut before a call of training, where it can't be.
        self.problems: dict[str, str] = {}

    def find(self, stages: int, boundaries: Sequence[str]) -> list[Cut]:
        """The cuts in the order of the calls, with a name for each.

        Args:
            stages: Number of stages that the model is to be cut into.
            boundaries: Names of modules that stages are to begin with.

        Raises:
            ConfigError: No stage can begin with one of them.
        """
        narrow = self._narrowest()
        kept = self._without_wider(narrow, self._done[-1] * _SHARE_OF_STAGE / stages)
        if len(kept) < stages - 1:
            kept = narrow
        found = {cut.training: cut for cut in kept}
        for name in boundaries:
            cut = self._at(name, found)
            found[cut.training] = cut
        ordered: list[Cut] = []
        for cut in sorted(found.values(), key=lambda cut: cut.training):
            # Calls may have another order in evaluation.
            if not ordered or cut.evaluation > ordered[-1].evaluation:
                ordered.append(cut)
        return ordered

    def _cut(self, position: int) -> Cut | str:
        """The cut before a call of training mode, or why there is none."""
        line, name = self._training, self._training.name_at(position)
        other = self._same.get(line.keys[position])
        if other is None or not other:
            return f"{line.calls[position].label} is not called in evaluation"
        if problem := line.problem_at(position) or self._evaluation.problem_at(other):
            return problem
        here, there = ([(info.shape[1:], info.dtype) for info in infos] for infos in
                       (line.infos(position), self._evaluation.infos(other)))  # fmt: skip
        if here != there:
            return f"other tensors cross in evaluation ({len(there)}) than in training ({len(here)})"
        return Cut(name, position, other, line.bytes_across(position), line.depth(position))

    def _narrowest(self) -> list[Cut]:
        """Between two calls with a weight matrix the cut where least crosses; of equals the outermost, last one."""
        heavy = [index for index, work in enumerate(self._training.work) if work]
        chosen = []
        for before, after in itertools.pairwise(heavy):
            cuts = []
            for position in range(before + 1, after + 1):
                cut = self._cut(position)
                if isinstance(cut, Cut):
                    cuts.append(cut)
                else:
                    self.problems.setdefault(self._training.name_at(position), cut)
            if cuts:
                chosen.append(min(cuts, key=lambda cut: (cut.bytes, cut.depth, -cut.training)))
        return chosen

    def _without_wider(self, cuts: Sequence[Cut], distance: float) -> list[Cut]:
        """Without each cut that has a better one within so much work."""
        kept: list[Cut] = []
        for cut in sorted(cuts, key=lambda cut: (cut.bytes, cut.depth, cut.training)):
            better = [
                other
                for other in kept
                if (other.bytes, other.depth) < (cut.bytes, cut.depth)
                and abs(self._done[other.training] - self._done[cut.training]) <= distance
            ]
            if not better:
                kept.append(cut)
        return kept

    def _at(self, name: str, found: dict[int, Cut]) -> Cut:
        position = self._training.position_of(name)
        names = [cut.name for _, cut in sorted(found.items())]
        if position is None:
            inside = [
                (module, reason)
                for module, reason in self._training.trace.closed.items()
                if name.startswith(f"{module}.")
            ]
            if inside:
                module, reason = inside[0]
                problem = f"lies inside {module}, which is run as a whole: {reason}"
                raise ConfigError("strategy.boundaries", name, problem, names)
            raise ConfigError("strategy.boundaries", name, "is no block that a stage could begin with", names)
        if not position:
            raise ConfigError("strategy.boundaries", name, "is what the model begins with", names)
        cut = self._cut(position)
        if isinstance(cut, str):
            raise ConfigError("strategy.boundaries", name, f"no stage can begin there: {cut}", names)
        return dataclasses.replace(cut, name=name)
