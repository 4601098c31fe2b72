"""Dynamic batching: images of different requests go through the model together."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from distrain.tools.serving.metrics import Metrics
from distrain.tools.serving.model import Answer, Pixels, ServedModel


@dataclass(frozen=True)
class _Waiting:
    """An image that waits for its model.

    Attributes:
        model: The one that shall answer.
        pixels: uint8 [C, H, W].
        top: How many ranked answers it gets.
        since: When it arrived, by the event loop's clock.
        answer: Gets the answer.
    """

    model: ServedModel
    pixels: Pixels
    top: int
    since: float
    answer: asyncio.Future[Answer | None]


class Batcher:
    """Gives a model the images that wait, as many at a time as may be.

    While the model works on a batch, images gather for the next one, so under load batches are full without waiting.
    Only an idle model waits for more images, and never longer than the timeout after the first of them arrived.

    Args:
        max_size: Images per batch at most.
        timeout: Seconds that an image waits for others at most, while the model is idle.
        executor: Runs models; of one thread.
        metrics: Where batches are counted.
    """

    def __init__(self, max_size: int, timeout: float, executor: Executor, metrics: Metrics) -> None:
        self._max_size, self._timeout, self._executor, self._metrics = max_size, timeout, executor, metrics
        self._queue: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._complete = asyncio.Event()
        metrics.waiting.set(0)

    async def answer(self, model: ServedModel, images: list[Pixels], top: int) -> list[Answer | None]:
        """Waits for the answers of a model for images; if it is cancelled, they leave the queue.

        Raises:
            Exception: What the model raised.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        items = [_Waiting(model, pixels, top, now, loop.create_future()) for pixels in images]
        self._queue.extend(items)
        self._metrics.waiting.set(len(self._queue))
        self._arrived.set()
        if len(self._queue) >= self._max_size:
            self._complete.set()
        return list(await asyncio.gather(*(item.answer for item in items)))

    async def run(self) -> None:
        """Answers for ever, until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            if not self._queue:
                self._arrived.clear()
                await self._arrived.wait()
            await self._gather(loop)
            batch = self._take()
            self._metrics.waiting.set(len(self._queue))
            if batch:
                await self._answer(loop, batch)

    async def _gather(self, loop: asyncio.AbstractEventLoop) -> None:
        """Waits until a batch is complete, or its first image has waited long enough."""
        until = self._queue[0].since + self._timeout
        if len(self._queue) < self._max_size and loop.time() < until:
            self._complete.clear()
            alarm = loop.call_at(until, self._complete.set)
            try:
                await self._complete.wait()
            finally:
                alarm.cancel()

    def _take(self) -> list[_Waiting]:
        """Removes the images of the next batch, which all have the same model, from the queue."""
        batch: list[_Waiting] = []
        while self._queue and len(batch) < self._max_size:
            if self._queue[0].answer.cancelled():
                self._queue.popleft()
            elif not batch or self._queue[0].model is batch[0].model:
                batch.append(self._queue.popleft())
            else:
                break
        return batch

    async def _answer(self, loop: asyncio.AbstractEventLoop, batch: list[_Waiting]) -> None:
        model, top = batch[0].model, max(item.top for item in batch)
        pixels = np.stack([item.pixels for item in batch])
        begin = time.perf_counter()
        try:
            answers = await loop.run_in_executor(self._executor, model.answer, pixels, top)
            if len(answers) != len(batch):
                raise ValueError(f"the model gave {len(answers)} answers for {len(batch)} images")
        except Exception as error:  # of the model; those who wait for it handle it
            for item in batch:
                if not item.answer.done():
                    item.answer.set_exception(error)
            return
        self._metrics.inference_seconds.observe(time.perf_counter() - begin)
        self._metrics.batch_size.observe(len(batch))
        self._metrics.images.inc(len(batch))
        for item, answer in zip(batch, answers, strict=True):
            if not item.answer.done():
                item.answer.set_result(None if answer is None else _shortened(answer, item.top))


def _shortened(answer: Answer, top: int) -> Answer:
    """An answer of a batch in which another image got more ranked answers."""
    ranked = answer.get("top")
    if ranked is None or len(ranked) == top:
        return answer
    rest = {name: value for name, value in answer.items() if name != "top"}
    return rest if top == 1 else {**rest, "top": ranked[:top]}
