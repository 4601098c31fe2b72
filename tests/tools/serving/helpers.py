"""A model whose answers are known, which can be held, and a server for it in the test's own event loop."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import io
import threading
from collections.abc import AsyncIterator, Callable, Hashable
from typing import Any

import httpx
import numpy as np
from PIL import Image

from distrain.tools.serving import app, server
from distrain.tools.serving.answering import ServingOptions
from distrain.tools.serving.limits import Limits
from distrain.tools.serving.metrics import Metrics
from distrain.tools.serving.model import About, Answer, CurrentModel, Pixels, ServedModel, Source
from tests.harness import HANG_SECONDS

LIMITS = Limits(
    request_bytes=100_000,
    pixels=10_000,
    queue=8,
    receive_seconds=HANG_SECONDS,
    answer_seconds=HANG_SECONDS,
    connections=50,
)
OPTIONS = ServingOptions(LIMITS, max_batch_size=4, batch_timeout=0.0, reload_seconds=0.0, decoders=1)


class GreyModel(ServedModel):
    """Says how bright a grey image is: its class is dark or bright, and its probability the mean of its pixels."""

    def __init__(self, name: str = "first") -> None:
        self.about = About(name, 7, "grey", "classification", ("dark", "bright"), (1, 4, 4), 2)
        self.batches: list[int] = []
        self.error: Exception | None = None
        #: Answers that it leaves out.
        self.forgets = 0
        self.may_go = threading.Event()
        self.may_go.set()
        self.works = threading.Event()

    def answer(self, pixels: Pixels, top: int) -> list[Answer | None]:
        self.batches.append(len(pixels))
        self.works.set()
        assert self.may_go.wait(HANG_SECONDS)
        if self.error is not None:
            raise self.error
        return [self._row(float(image.mean()) / 255, top) for image in pixels][self.forgets :]

    def _row(self, bright: float, top: int) -> Answer | None:
        if bright == 1:
            return None
        ranked = sorted(zip(self.about.classes, (1 - bright, bright), strict=True), key=lambda pair: -pair[1])
        rows = [{"class": name, "probability": value} for name, value in ranked[:top]]
        return {**rows[0], **({"top": rows} if top > 1 else {})}


class Shelf(Source):
    """Holds the models that a test puts there; the last one is the newest."""

    def __init__(self, *models: ServedModel) -> None:
        self.models = list(models)
        self.error: Exception | None = None

    def state(self) -> Hashable:
        return len(self.models), self.error

    def newest(self) -> Hashable:
        if self.error is not None:
            raise self.error
        return len(self.models)

    def load(self) -> ServedModel:
        return self.models[-1]


@dataclasses.dataclass
class Running:
    """An application that runs in this event loop."""

    client: httpx.AsyncClient
    model: GreyModel
    shelf: Shelf
    metrics: Metrics

    async def post(self, *brightness: int, top: int = 1) -> httpx.Response:
        """Asks for grey images of these brightnesses, from 0 to 255."""
        return await self.client.post(f"/predict?top={top}", json={"images": [encoded(value) for value in brightness]})


def application(options: ServingOptions = OPTIONS) -> tuple[Any, GreyModel, Shelf, Metrics]:
    model, metrics = GreyModel(), Metrics()
    shelf = Shelf(model)
    current = CurrentModel(shelf, (1,), metrics)
    model.batches.clear()
    model.works.clear()
    return app.build(current, options, metrics), model, shelf, metrics


@contextlib.asynccontextmanager
async def running(options: ServingOptions = OPTIONS) -> AsyncIterator[Running]:
    """The application without a socket."""
    built, model, shelf, metrics = application(options)
    transport = httpx.ASGITransport(built)
    async with (
        built.router.lifespan_context(built),
        httpx.AsyncClient(transport=transport, base_url="http://here", timeout=HANG_SECONDS) as client,
    ):
        try:
            yield Running(client, model, shelf, metrics)
        finally:
            model.may_go.set()


@contextlib.asynccontextmanager
async def listening(
    limits: Limits = LIMITS, stop_seconds: float = HANG_SECONDS
) -> AsyncIterator[tuple[server.GracefulServer, int, GreyModel]]:
    """The application behind a socket; gives the server and its port."""
    built, model, _, _ = application(dataclasses.replace(OPTIONS, limits=limits))
    started = asyncio.Event()
    served = server.make_server(built, limits, stop_seconds, started.set)
    with server.bind("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        task = asyncio.create_task(served.serve([bound]))
        try:
            await asyncio.wait_for(started.wait(), HANG_SECONDS)
            yield served, port, model
        finally:
            model.may_go.set()
            served.should_exit = True
            await asyncio.wait_for(task, HANG_SECONDS)


def png(brightness: int, size: tuple[int, int] = (4, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((size[1], size[0]), brightness, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def encoded(brightness: int) -> str:
    return base64.b64encode(png(brightness)).decode()


async def until(condition: Callable[[], bool]) -> None:
    """Waits for a condition."""

    async def look() -> None:
        while not condition():
            await asyncio.sleep(0.005)

    await asyncio.wait_for(look(), HANG_SECONDS)


async def exchange(port: int, *pieces: bytes) -> bytes:
    """Sends pieces on a connection of its own; returns all that comes until the server ends it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        return await asyncio.wait_for(reader.read(), HANG_SECONDS)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
