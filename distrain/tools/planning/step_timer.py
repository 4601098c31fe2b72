"""Times the training steps of one process, on several ranks at once."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distrain.communication.collectives import Communicator, digest
from distrain.communication.types import Reduction
from distrain.compression.autotune.step_trace import synchronised_time
from distrain.data.batch import Batch
from distrain.gradients.trainable_parameters import trainable_parameters
from distrain.runtime.live_memory import LiveMemory
from distrain.strategies.sharpness import Sharpness
from distrain.strategies.single import Single
from distrain.tools.planning.cluster import expected_maximum
from distrain.tools.planning.robust_mean import undisturbed, undisturbed_mean

#: Seconds of steps of one size, and the fewest steps.
_STEP_SECONDS, _FEWEST = 1.5, 3
#: Turns of steps with and without waiting for other ranks.
_TURNS = 9
#: Seconds of a step from which on fewer are timed, the first one among them: mostly, that it also allocates memory is
#: little of it.
_LONG_STEP, _FEWEST_LONG = 0.5, 2
#: The same where ranks take turns on the processors, so that a few steps say little; and for how many times as long
#: steps of one size are taken there.
_LONG_STEP_IN_TURNS, _TIMES_IN_TURNS = 2.0, 2
#: Seconds of passes up to which they are measured twice; and up to which those of a rank's whole step are.
_REPEATED, _WHOLE_REPEATED = 0.2, 0.8
#: Seconds of the very first step, which also loads kernels and modules of torch, from which on that is little of it.
_LONG_FIRST_STEP = 5.0
#: Times that the gradients are copied and hashed, or fewer in so many seconds.
_COPIES, _COPY_SECONDS = 5, 0.3
#: Times that the optimizer, and what surrounds it, is timed, after one that is not counted.
_UPDATES = 3


@dataclass(frozen=True)
class StepTimes:
    """Seconds of steps with one number of samples.

    Attributes:
        loading: Waiting for the next batch.
        passes: Forward and backward passes.
        spread: As :meth:`StepTimer.spread`, of long steps of all ranks at the same time; ``None``: not known.
    """

    loading: float
    passes: float
    spread: float | None = None

    @property
    def is_long(self) -> bool:
        """Whether such a step is not to be repeated often."""
        return self.passes >= _LONG_STEP


class StepTimer:
    """Times steps of one training.

    Args:
        strategy: Takes the steps.
        batches: Makes batches of a number of samples, without end.
        everyone: All ranks.
        device: Of this rank.
        takes_turns: A machine has more of the ranks than processors; the same on all ranks.
    """

    def __init__(
        self,
        strategy: Single,
        batches: Callable[[int], Iterator[Batch]],
        everyone: Communicator,
        device: torch.device,
        *,
        takes_turns: bool = False,
    ) -> None:
        self._strategy, self._batches, self._everyone, self._device = strategy, batches, everyone, device
        self._takes_turns = takes_turns
        #: Long steps of :meth:`first_steps`, by number of samples: :meth:`steps` counts them too.
        self._long_steps: dict[int, tuple[float, float]] = {}

    def first_steps(self, size: int) -> float:
        """Seconds of a step after the first one, which is slow; all ranks call it together.

        Of a very long step the first one counts.
        """
        batches = self._batches(size)
        step = self._step(batches)
        if self.agree(sum(step)) < _LONG_FIRST_STEP:
            step = self._step(batches)
        seconds = self.agree(sum(step))
        if seconds >= _LONG_STEP:
            self._long_steps[size] = step
        return seconds

    def update_seconds(self) -> float:
        """Seconds of the optimizer, after some step has made gradients."""
        times = []
        for _ in range(1 + _UPDATES):
            begin = synchronised_time(self._device)
            self._strategy.optimizer.step()
            times.append(synchronised_time(self._device) - begin)
        return statistics.median(times[1:])

    def sharpness_seconds(self, rho: float) -> float:
        """Seconds in which sharpness-aware minimization moves the parameters and back, after some step.

        Args:
            rho: How far they are moved.
        """
        sharpness, times = Sharpness(rho, [self._strategy.model]), []
        for _ in range(1 + _UPDATES):
            begin = synchronised_time(self._device)
            with sharpness.moved(self._strategy.gradients.norm()):
                pass
            times.append(synchronised_time(self._device) - begin)
        return statistics.median(times[1:])

    def update_bytes(self) -> int:
        """Most bytes that the optimizer needs while it works."""
        live = LiveMemory(self._device)
        with live:
            self._strategy.optimizer.step()
        return live.peak

    def optimizer_bytes(self) -> int:
        """Bytes of the optimizer's state."""
        states = self._strategy.optimizer.state.values()
        return sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))

    def steps(self, size: int, update: float, *, together: bool = True) -> StepTimes:
        """Times steps on batches of a number of samples.

        Args:
            size: Number of samples.
            update: Seconds of the optimizer.
            together: All ranks do so at the same time, and begin and end together. Otherwise a single long step is
                timed, since this rank has taken some before.
        """
        batches = self._batches(size)
        first = self._long_steps.pop(size, None) if together else None
        first = first or self._step(batches)
        longest = self.agree(sum(first)) if together else sum(first)
        is_long = longest >= (_LONG_STEP_IN_TURNS if self._takes_turns else _LONG_STEP)
        window = _STEP_SECONDS * (_TIMES_IN_TURNS if self._takes_turns else 1)
        fewest, seconds = _FEWEST, max(window, _FEWEST * longest)
        if is_long:
            fewest, seconds = _FEWEST_LONG if together else 1, 0.0
        times = [first] if is_long else []
        begin = time.perf_counter()
        # For a time and not for a number of steps: where ranks outnumber processors some are faster for a while, and
        # what the others take after those have ended says nothing.
        while len(times) < fewest or time.perf_counter() - begin < seconds:
            times.append(self._step(batches))
        # Of ranks that take turns, one is faster in one long step and another one in the next.
        all_count = self._takes_turns and longest >= _LONG_STEP
        mean: Callable[[Sequence[float]], float] = statistics.mean if all_count else undisturbed_mean
        loading = mean([loaded for loaded, _ in times])
        passes = max(mean([taken for _, taken in times]) - update, 0.0)
        if together:
            # The slowest rank's, for which the others wait sooner or later.
            loading, passes = (self.agree(value) for value in (loading, passes))
        spread = self._spread_of([sum(step) for step in times]) if together and is_long else None
        return StepTimes(loading, passes, spread)

    def steps_again(self, size: int, before: StepTimes, update: float, is_whole: bool) -> StepTimes:
        """Times steps a second time, unless they are long; all ranks call it together.

        Args:
            size: Number of samples.
            before: What :meth:`steps` has returned for them, together.
            update: Seconds of the optimizer.
            is_whole: These are all samples of a rank's step.
        """
        turns = self._takes_turns
        if before.passes >= _REPEATED and not (is_whole and (turns or before.passes < _WHOLE_REPEATED)):
            return before
        again = self.steps(size, update)
        both = [before.passes, again.passes]
        # A machine is seldom disturbed both times. How ranks take turns in long steps differs from time to time.
        passes = statistics.mean(both) if turns and before.passes >= _REPEATED else undisturbed(both)
        return dataclasses.replace(again, passes=passes)

    def passes_together(self, size: int, count: int, update: float) -> float:
        """Seconds of the passes of steps in which ranks wait for each other, so that all must take as many.

        Args:
            size: Number of samples.
            count: Number of steps, after one that is not counted. Of long steps there are two, of which the faster one
                counts, unless ranks take turns.
            update: Seconds of the optimizer.
        """
        batches = self._batches(size)
        first = self._step(batches)[1]
        if self.agree(first) >= _LONG_STEP and not self._takes_turns:
            times = [min(first, self._step(batches)[1])]
        else:
            times = [self._step(batches)[1] for _ in range(count)]
        return self.agree(max(undisturbed_mean(times) - update, 0.0))

    def _spread_of(self, steps: Sequence[float]) -> float:
        """As :meth:`spread`, from steps of ranks that did not wait for each other, if they had."""
        latest = statistics.mean(self.agree(seconds) for seconds in steps)
        free = self.agree(statistics.mean(steps))
        return max(latest - free, 0.0) / free / max(expected_maximum(self._everyone.size), 1e-9)

    def spread(self, size: int, about: float) -> float:
        """By how much ranks that wait for each other after each step are slower, as a standard deviation.

        Steps with and without waiting take turns, since a machine becomes faster and slower by more than they differ.

        Args:
            size: Number of samples of a step.
            about: Seconds of a step of ranks that don't wait.

        Returns:
            The standard deviation of a rank's step, relative to its mean, with which the slowest of these ranks would
            be as late as it is.
        """
        batches = self._batches(size)
        count = max(int(_STEP_SECONDS / _TURNS / about), 1)
        free, waiting = [], []
        for _ in range(_TURNS):
            before = self._mean_step(batches, -(-count // 2))
            steps, barriers = [], []
            for _ in range(count):
                begin = synchronised_time(self._device)
                self._step(batches)
                self._everyone.barrier()
                middle = synchronised_time(self._device)
                self._everyone.barrier()
                steps.append(middle - begin)
                barriers.append(synchronised_time(self._device) - middle)
            # Before and after, so that a steady change cancels out.
            free.append(self.agree((before + self._mean_step(batches, -(-count // 2))) / 2))
            waiting.append(statistics.mean(steps) - statistics.median(barriers))
        # The fastest turn of each kind: in another one, what disturbs a rank makes all of them late.
        lateness = self.agree(min(waiting) - min(free), "sum") / self._everyone.size
        return max(lateness, 0.0) / min(free) / expected_maximum(self._everyone.size)

    def _mean_step(self, batches: Iterator[Batch], count: int) -> float:
        """Mean seconds of so many steps, after which ranks wait for each other."""
        mean = statistics.mean(sum(self._step(batches)) for _ in range(count))
        self._everyone.barrier()
        return mean

    def agree(self, value: float, reduction: Reduction = "max") -> float:
        """The largest value of all ranks, or their sum; all ranks call it together."""
        tensor = torch.tensor([value], dtype=torch.float64, device=self._device)
        return float(self._everyone.all_reduce(tensor, reduction)) if self._everyone.size > 1 else value

    def _step(self, batches: Iterator[Batch]) -> tuple[float, float]:
        """Seconds of waiting for the batch, and of the rest."""
        begin = synchronised_time(self._device)
        batch = next(batches)
        middle = synchronised_time(self._device)
        self._strategy.train_step(batch)
        return middle - begin, synchronised_time(self._device) - middle


def copy_seconds(model: nn.Module, device: torch.device) -> tuple[float, float]:
    """Seconds of copying, and of hashing, as many bytes as all gradients have."""
    parameters = list(trainable_parameters(model).values())
    source, target = (torch.cat([one.detach().flatten() for one in parameters]) for _ in range(2))
    times: list[tuple[float, float]] = []
    while len(times) < 2 or (len(times) < _COPIES and sum(map(sum, times)) < _COPY_SECONDS):
        begin = synchronised_time(device)
        target.copy_(source)
        middle = synchronised_time(device)
        digest([source])
        times.append((middle - begin, synchronised_time(device) - middle))
    copying, hashing = (statistics.median(column) for column in zip(*times[1:], strict=True))
    return copying, hashing
