"""From the body of a request to the answers: received, decoded, batched, within the limits."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request

from distrain.tools.serving import content
from distrain.tools.serving.batching import Batcher
from distrain.tools.serving.limits import Admission, Held, Limits, Refused, read_body
from distrain.tools.serving.metrics import Metrics
from distrain.tools.serving.model import Answer, CurrentModel, Pixels


@dataclass(frozen=True)
class ServingOptions:
    """How requests are answered.

    Attributes:
        limits: What is accepted.
        max_batch_size: Images per batch at most.
        batch_timeout: Seconds that an image waits for others at most, while the model is idle.
        reload_seconds: Time between two looks for a newer model; 0: none.
        decoders: Threads that decode images.
    """

    limits: Limits
    max_batch_size: int
    batch_timeout: float
    reload_seconds: float
    decoders: int


class Answering:
    """Answers requests by the current model.

    Args:
        current: The model.
        options: How requests are answered.
        metrics: What is counted.
    """

    def __init__(self, current: CurrentModel, options: ServingOptions, metrics: Metrics) -> None:
        self._current, self._options = current, options
        self._admission = Admission(options.limits)
        self._decoding = ThreadPoolExecutor(options.decoders, "decode")
        self._inference, self._loading = ThreadPoolExecutor(1, "inference"), ThreadPoolExecutor(1, "load")
        self._batcher = Batcher(options.max_batch_size, options.batch_timeout, self._inference, metrics)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Works in the background, as long as this context is open."""
        tasks = [asyncio.create_task(self._batcher.run())]
        if self._options.reload_seconds:
            tasks.append(asyncio.create_task(self._current.watch(self._options.reload_seconds, self._loading)))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            for executor in (self._decoding, self._inference, self._loading):
                executor.shutdown(wait=False, cancel_futures=True)

    async def answer(self, request: Request, top: int) -> dict[str, Any]:
        """The answer to a request, as plain data.

        Args:
            request: The request.
            top: How many ranked answers each image gets, if there are as many.

        Raises:
            Refused: The request can't be answered.
            ClientDisconnect: Its client is gone, so its images have left the queue.
        """
        limits = self._options.limits
        with self._admission.request() as held:
            parse = content.parser(request.headers.get("content-type"), limits.queue)
            body = await read_body(request.stream(), request.headers.get("content-length"), held, limits)
            held.take_images(1)
            work = asyncio.ensure_future(self._predict(parse, body, held, top))
            gone = asyncio.ensure_future(_disconnected(request))
            try:
                await asyncio.wait({work, gone}, timeout=limits.answer_seconds, return_when=asyncio.FIRST_COMPLETED)
                if work.done():
                    return work.result()
                if gone.done():
                    raise ClientDisconnect
                raise Refused(504, f"no answer within {limits.answer_seconds:g} seconds", retry_after=1)
            finally:
                work.cancel()
                gone.cancel()

    async def _predict(self, parse: content.Parser, body: bytes, held: Held, top: int) -> dict[str, Any]:
        # Taken once: a newer model may come while the request waits.
        model, limits = self._current.model, self._options.limits
        about = model.about

        def decode() -> list[Pixels]:
            encoded = parse(body)
            if len(encoded) > limits.queue:
                raise Refused(413, f"{len(encoded)} images in one request; there is room for {limits.queue}")
            images = content.decoded(encoded, about.shape, limits.pixels)
            # A thread can't be cancelled: it would decode all images of a client that is gone.
            return list(itertools.takewhile(lambda _: not held.is_over, images))

        images = await asyncio.get_running_loop().run_in_executor(self._decoding, decode)
        held.take_images(len(images) - 1)
        answers = await self._batcher.answer(model, images, min(top, about.largest_top))
        predictions: list[Answer] = []
        for place, answer in enumerate(answers):
            if answer is None:
                raise Refused(500, f"the model's output for image {place} is not finite; did the training diverge?")
            predictions.append(answer)
        return {"model": {"name": about.name, "step": about.step}, "predictions": predictions}


async def _disconnected(request: Request) -> None:
    """Waits until the client of a request has gone; the request's body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
