"""Measures the phases of training steps from outside, without support by the measured code.

At any moment a rank's main thread is in exactly one phase. Entering a phase ends the previous one, so the phases of a
step add up to the step. Gradient exchanges overlap with phases; the part of an exchange within the backward pass is
hidden.
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

#: In the order of a step. ``exchange`` is the time that the main thread spends on it: the exposed part. ``python`` is
#: everything else.
PHASES = ("data", "forward", "backward", "exchange", "optimizer", "log", "python")


class PhaseTimer:
    """Records the phases of one rank's steps, and the exchanges and garbage collections that overlap with them."""

    def __init__(self) -> None:
        self._spans: dict[str, list[Span]] = {}
        self._phase, self._since = "python", time.perf_counter()
        self.restart()

    def restart(self) -> None:
        """Discards what was recorded during the warm-up."""
        self._spans = {name: [] for name in (*PHASES, "exchanges", "collections")}
        self._since = time.perf_counter()

    def enter(self, phase: str) -> str:
        """Begins a phase of the main thread; returns the previous phase."""
        now, before = time.perf_counter(), self._phase
        self._spans[before].append((self._since, now))
        self._phase, self._since = phase, now
        return before

    def within(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a function so that each call is in a phase; afterwards the previous phase continues."""

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            before = self.enter(phase)
            result = function(*args, **kwargs)
            self.enter(before)
            return result

        return wrapped

    def time_batches(self, batches: Iterator[BatchT]) -> Generator[BatchT, None, None]:
        """Yields the same batches; waiting for one is phase ``data``."""
        while True:
            self.enter("data")
            batch = next(batches, None)
            self.enter("python")
            if batch is None:
                return
            yield batch

    def exchange(self, future: Any) -> Any:
        """Records an exchange that begins now and ends with the future; returns a future with the same value."""
        began = time.perf_counter()

        def record(done: Any) -> Any:
            self._spans["exchanges"].append((began, time.perf_counter()))
            return done.value()[0]

        return future.then(record)

    def instrument_torch(self) -> None:
        """Instruments all backward passes, optimizer steps and garbage collections of this process."""
        backward: Callable[..., None] = Tensor.backward

        def timed(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
            self.enter("backward")
            backward(tensor, *args, **kwargs)
            self.enter("python")

        Tensor.backward = timed  # type: ignore[method-assign,assignment]
        optimizers.register_optimizer_step_pre_hook(lambda *_: self._hook("optimizer"))
        optimizers.register_optimizer_step_post_hook(lambda *_: self._hook("python"))
        gc.callbacks.append(self._on_collection)

    def instrument_model(self, model: nn.Module) -> None:
        """Instruments the forward pass: from the model's call to the backward pass, so it includes the loss."""
        model.register_forward_pre_hook(lambda *_: self._hook("forward"))

    def instrument_ddp(self, model: nn.parallel.DistributedDataParallel) -> None:
        """Instruments torch's DistributedDataParallel: its work around the model's passes is the exchange."""
        model.register_forward_pre_hook(lambda *_: self._hook("exchange"))
        self.instrument_model(model.module)
        ranks = dist.get_world_size()

        def reduce(bucket: Any) -> Any:
            self.enter("exchange")
            work = dist.all_reduce(bucket.buffer().div_(ranks), async_op=True)
            assert work is not None, "the group has no ranks"
            done = self.exchange(work.get_future())
            # After the last bucket all gradients are computed: the rest of the pass is waiting and copying.
            if not bucket.is_last():
                self.enter("backward")
            return done

        # torch compares the hook's annotations with classes, but postponed annotations are text. A lambda has none.
        model.register_comm_hook(None, lambda _, bucket: reduce(bucket))

    def instrument_trainer(self, trainer: Any) -> None:
        """Instruments a distrain trainer whose strategy reduces gradients in buckets."""
        strategy, loader = trainer.strategy, trainer.loaders["train"]
        epoch, start = loader.epoch, strategy.replicas.start_all_reduce
        loader.epoch = lambda *args: self.time_batches(epoch(*args))
        self.instrument_model(strategy.model)
        strategy.gradients.finish = self.within("exchange", strategy.gradients.finish)
        strategy.gradients._send_next = self.within("exchange", strategy.gradients._send_next)
        trainer.report.log_steps = self.within("log", trainer.report.log_steps)

        def start_all_reduce(*args: Any) -> Any:
            pending = start(*args)
            work = getattr(pending, "_work", None)
            # Without a thread of its own, an exchange progresses only during a wait, so nothing of it is hidden.
            if work is not None:
                self.exchange(work.get_future())
            return pending

        strategy.replicas.start_all_reduce = start_all_reduce

    def milliseconds(self, steps: int) -> dict[str, float]:
        """Mean milliseconds of a step by phase, and of ``hidden`` exchanges and garbage ``collections``."""
        self.enter(self._phase)
        seconds = {name: sum(end - start for start, end in self._spans[name]) for name in (*PHASES, "collections")}
        seconds["hidden"] = _overlap(self._spans["exchanges"], self._spans["backward"])
        return {name: 1000 * total / steps for name, total in seconds.items()}

    def _hook(self, phase: str) -> None:
        """Like :meth:`enter`, but returns nothing, because torch would use a hook's return value."""
        self.enter(phase)

    def _on_collection(self, phase: str, _: object) -> None:
        now = time.perf_counter()
        if phase == "start":
            self._collection_began = now
        else:
            self._spans["collections"].append((self._collection_began, now))


def _overlap(some: list[Span], others: list[Span]) -> float:
    """Seconds covered by both lists of spans; the spans of one list may overlap each other."""
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
