"""Where the time of a training step goes, watched from outside: what is watched has nothing in it for this.

At any moment a rank's main thread is in one phase. Entering the next ends the last, so that the phases of a step add up
to the step. Exchanges run beside them: what of an exchange lies within the backward pass is hidden.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import optimizer as optimizers

BatchT = TypeVar("BatchT")
Span = tuple[float, float]

#: In the order of a step. ``exchange`` is what the main thread spends on it: the exposed part. ``python`` is the rest.
PHASES = ("data", "forward", "backward", "exchange", "optimizer", "log", "python")


class Timeline:
    """The phases of one rank's steps, and the exchanges and garbage collections beside them."""

    def __init__(self) -> None:
        self._spans: dict[str, list[Span]] = {}
        self._phase, self._since = "python", time.perf_counter()
        self.restart()

    def restart(self) -> None:
        """Forgets what was; the warm-up is over."""
        self._spans = {name: [] for name in (*PHASES, "exchanges", "collections")}
        self._since = time.perf_counter()

    def enter(self, phase: str) -> str:
        """The main thread enters a phase; returns the one it leaves."""
        now, before = time.perf_counter(), self._phase
        self._spans[before].append((self._since, now))
        self._phase, self._since = phase, now
        return before

    def within(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose calls are in a phase, after which the phase is what it was."""

        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            before = self.enter(phase)
            result = function(*args, **kwargs)
            self.enter(before)
            return result

        return watched

    def drawn(self, batches: Iterator[BatchT]) -> Generator[BatchT, None, None]:
        """The same batches; waiting for one is ``data``."""
        while True:
            self.enter("data")
            batch = next(batches, None)
            self.enter("python")
            if batch is None:
                return
            yield batch

    def exchange(self, future: Any) -> Any:
        """An exchange begins, which ends with a future; returns one with the same value."""
        began = time.perf_counter()

        def note(done: Any) -> Any:
            self._spans["exchanges"].append((began, time.perf_counter()))
            return done.value()[0]

        return future.then(note)

    def watch_torch(self) -> None:
        """Backward passes, optimizers' updates and the garbage collector of this process, whoever calls them."""
        backward: Callable[..., None] = Tensor.backward

        def watched(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
            self.enter("backward")
            backward(tensor, *args, **kwargs)
            self.enter("python")

        Tensor.backward = watched  # type: ignore[method-assign,assignment]
        optimizers.register_optimizer_step_pre_hook(lambda *_: self._leave_for("optimizer"))
        optimizers.register_optimizer_step_post_hook(lambda *_: self._leave_for("python"))
        gc.callbacks.append(self._collecting)

    def watch_model(self, model: nn.Module) -> None:
        """The forward pass begins with the model and ends where the backward pass begins, so the loss is in it."""
        model.register_forward_pre_hook(lambda *_: self._leave_for("forward"))

    def watch_ddp(self, model: nn.parallel.DistributedDataParallel) -> None:
        """What torch's DistributedDataParallel does before and behind a model's own passes is its exchange."""
        model.register_forward_pre_hook(lambda *_: self._leave_for("exchange"))
        self.watch_model(model.module)
        ranks = dist.get_world_size()

        def reduce(bucket: Any) -> Any:
            self.enter("exchange")
            work = dist.all_reduce(bucket.buffer().div_(ranks), async_op=True)
            assert work is not None, "the group has no ranks"
            done = self.exchange(work.get_future())
            # All gradients are there when the last bucket is sent: what is left of the pass is waiting and copying.
            if not bucket.is_last():
                self.enter("backward")
            return done

        # torch compares annotations with the class itself; of a postponed one only the text is there.
        model.register_comm_hook(None, lambda _, bucket: reduce(bucket))

    def watch_trainer(self, trainer: Any) -> None:
        """A distrain trainer with a strategy that reduces gradients in buckets."""
        strategy, loader = trainer.strategy, trainer.loaders["train"]
        epoch, start = loader.epoch, strategy.replicas.start_all_reduce
        loader.epoch = lambda *args: self.drawn(epoch(*args))
        self.watch_model(strategy.model)
        strategy.gradients.finish = self.within("exchange", strategy.gradients.finish)
        strategy.gradients._launch = self.within("exchange", strategy.gradients._launch)
        trainer.report.log_steps = self.within("log", trainer.report.log_steps)

        def start_all_reduce(*args: Any) -> Any:
            pending = start(*args)
            work = getattr(pending, "_work", None)
            # What has no thread of its own goes on only while somebody waits for it, and so hides nothing.
            if work is not None:
                self.exchange(work.get_future())
            return pending

        strategy.replicas.start_all_reduce = start_all_reduce

    def milliseconds(self, steps: int) -> dict[str, float]:
        """What a step spent in each phase; besides, ``hidden`` exchanges and garbage ``collections``."""
        self.enter(self._phase)
        found = {name: sum(end - start for start, end in self._spans[name]) for name in (*PHASES, "collections")}
        found["hidden"] = _overlap(self._spans["exchanges"], self._spans["backward"])
        return {name: 1000 * seconds / steps for name, seconds in found.items()}

    def _leave_for(self, phase: str) -> None:
        """As :meth:`enter`, for hooks, of which what is returned would count."""
        self.enter(phase)

    def _collecting(self, phase: str, _: object) -> None:
        now = time.perf_counter()
        if phase == "start":
            self._began_collecting = now
        else:
            self._spans["collections"].append((self._began_collecting, now))


def _overlap(some: list[Span], others: list[Span]) -> float:
    """Seconds that lie in one of ``some`` and in one of ``others``; of each, spans may overlap."""
    edges = sorted(
        (moment, kind, change)
        for kind, spans in enumerate((some, others))
        for start, end in spans
        for moment, change in ((start, 1), (end, -1))
    )
    inside, total, last = [0, 0], 0.0, 0.0
    for moment, kind, change in edges:
        total += moment - last if all(inside) else 0.0
        inside[kind] += change
        last = moment
    return total
