"""How much of a client is accepted: bytes, pixels, time and requests, and what it is told beyond that."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

#: Bodies of the largest size that may be in memory at a time.
_MOST_BODIES = 32
#: A body that is too large is read this many times as far as is allowed, and dropped, so that clients which send
#: everything before they read get the reason and no broken connection.
_DROPPED = 4


class Refused(Exception):
    """A request is refused.

    Args:
        status: The HTTP status.
        detail: Why, for whoever sent it.
        retry_after: Seconds after which it may be tried again; ``None``: trying again won't help.
        close: The connection ends, since the rest of the request was not read.
    """

    def __init__(self, status: int, detail: str, *, retry_after: int | None = None, close: bool = False) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail
        self.headers = {} if retry_after is None else {"retry-after": str(retry_after)}
        if close:
            self.headers["connection"] = "close"


@dataclass(frozen=True)
class Limits:
    """What one worker accepts.

    Attributes:
        request_bytes: Largest body of a request.
        pixels: Most pixels of an image.
        queue: Images that are decoded or wait for their answer at a time.
        receive_seconds: Time in which a request must arrive: its header, and its body.
        answer_seconds: Time after which a request that has arrived is answered at the latest.
        connections: Open connections.
    """

    request_bytes: int
    pixels: int
    queue: int
    receive_seconds: float
    answer_seconds: float
    connections: int


class Admission:
    """Counts what requests hold, and refuses those that would take it beyond the limits.

    Args:
        limits: The limits.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._images = self._bytes = 0

    @contextlib.contextmanager
    def request(self) -> Iterator[Held]:
        """Admits a request. It takes a place in the queue when it has arrived, or slow clients could fill the queue.

        Raises:
            Refused: The queue is full.
        """
        held = Held(self)
        if self._images >= self._limits.queue:
            raise self._full(close=True)
        try:
            yield held
        finally:
            held.is_over = True
            self._images -= held.images
            self._bytes -= held.bytes

    def take_images(self, count: int) -> None:
        """Adds to the images of all requests; see :meth:`Held.take_images`."""
        if self._images + count > self._limits.queue:
            raise self._full()
        self._images += count

    def take_bytes(self, count: int) -> None:
        """Adds to the bodies of all requests; see :meth:`Held.take_bytes`."""
        if self._bytes + count > _MOST_BODIES * self._limits.request_bytes:
            raise Refused(503, "too many large requests arrive; try again later", retry_after=1, close=True)
        self._bytes += count

    def _full(self, *, close: bool = False) -> Refused:
        return Refused(503, "too many requests wait; try again later", retry_after=1, close=close)


class Held:
    """What one request holds until it is answered.

    Args:
        admission: Of all requests.

    Attributes:
        images: Places in the queue.
        bytes: Of its body.
        is_over: Whether it has been answered or given up, so that nobody needs a result any more.
    """

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.images = self.bytes = 0
        self.is_over = False

    def take_images(self, count: int) -> None:
        """Takes places in the queue.

        Raises:
            Refused: It is full.
        """
        self._admission.take_images(count)
        self.images += count

    def take_bytes(self, count: int) -> None:
        """Takes memory for a piece of the body.

        Raises:
            Refused: The bodies of all requests together are too large.
        """
        self._admission.take_bytes(count)
        self.bytes += count


async def read_body(pieces: AsyncIterator[bytes], length: str | None, held: Held, limits: Limits) -> bytes:
    """Reads a request's body.

    Args:
        pieces: The body, as it arrives.
        length: What the header says of its length.
        held: Counts it.
        limits: The limits.

    Raises:
        Refused: It is too large, or does not arrive in time.
    """
    try:
        return await asyncio.wait_for(_read(pieces, length, held, limits.request_bytes), limits.receive_seconds)
    except asyncio.TimeoutError:
        problem = f"the request did not arrive within {limits.receive_seconds:g} seconds"
        raise Refused(408, problem, close=True) from None


async def _read(pieces: AsyncIterator[bytes], length: str | None, held: Held, most: int) -> bytes:
    announced = int(length) if length is not None and length.isdecimal() else 0
    if announced > _DROPPED * most:
        raise _too_large(most)
    content, size = bytearray(), 0
    async for piece in pieces:
        size += len(piece)
        if max(size, announced) <= most:
            held.take_bytes(len(piece))
            content += piece
        elif size > _DROPPED * most:
            break
        else:
            content.clear()
    if max(size, announced) > most:
        raise _too_large(most)
    return bytes(content)


def _too_large(most: int) -> Refused:
    return Refused(413, f"the request has more than {most} bytes", close=True)
