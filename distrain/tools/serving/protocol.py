"""HTTP connections with limits that uvicorn lacks: for clients that are too slow, send without end, or don't read."""

from __future__ import annotations

import asyncio
import http
import json
from typing import Any

from typing_extensions import override
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from distrain.tools.serving.limits import Limits

#: Largest header of a request, and most bytes between two pieces of a body, in bytes.
_HEADER_BYTES = 1 << 16


class LimitedProtocol(HttpToolsProtocol):
    """One connection.

    Args:
        limits: Its limits.
        **options: Of uvicorn.
    """

    def __init__(self, *, limits: Limits, **options: Any) -> None:
        super().__init__(**options)
        self._limits = limits
        self._header_alarm: asyncio.TimerHandle | None = None
        self._reading_alarm: asyncio.TimerHandle | None = None
        self._header_bytes = 0

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections:
            self._end(503, "too many connections; try again later")
        else:
            self._await_header()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        for alarm in (self._header_alarm, self._reading_alarm):
            if alarm is not None:
                alarm.cancel()
        super().connection_lost(exc)

    @override
    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        # Between two requests there is no alarm; and empty lines begin no request.
        if self._header_alarm is None and not self.is_busy:
            self._await_header()
        # Also while another request waits for its answer, and behind a body, since uvicorn keeps all headers.
        self._header_bytes += len(data)
        super().data_received(data)
        if self._header_bytes > _HEADER_BYTES:
            self._end(431, f"the header has more than {_HEADER_BYTES} bytes")

    @override
    def on_headers_complete(self) -> None:
        if self._header_alarm is not None:
            self._header_alarm.cancel()
            self._header_alarm = None
        # What came with the end of a header belongs to its body.
        self._header_bytes = 0
        super().on_headers_complete()

    @override
    def on_body(self, body: bytes) -> None:
        self._header_bytes = 0
        if self.cycle.response_complete:
            # The request was answered without its body, which nobody reads; it may have no end.
            self.transport.close()
        super().on_body(body)

    @override
    def on_message_complete(self) -> None:
        self._header_bytes = 0
        super().on_message_complete()

    @override
    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading_alarm = self.loop.call_later(self._limits.receive_seconds, self.transport.abort)

    @override
    def resume_writing(self) -> None:
        if self._reading_alarm is not None:
            self._reading_alarm.cancel()
            self._reading_alarm = None
        super().resume_writing()

    @override
    def send_400_response(self, msg: str) -> None:
        self._end(400, msg)

    @property
    def is_busy(self) -> bool:
        """Whether a request is being received or answered."""
        # uvicorn says that there always is a cycle; before the first request there is none.
        return not getattr(self.cycle, "response_complete", True)

    def _await_header(self) -> None:
        self._header_bytes = 0
        self._header_alarm = self.loop.call_later(self._limits.receive_seconds, self._header_late)

    def _header_late(self) -> None:
        self._end(408, f"the header did not arrive within {self._limits.receive_seconds:g} seconds")

    def _end(self, status: int, detail: str) -> None:
        """Ends the connection with an error that no application knows of."""
        if self.transport.is_closing():
            return
        content = json.dumps({"detail": detail}).encode()
        lines = [
            f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}",
            "content-type: application/json",
            f"content-length: {len(content)}",
            "connection: close",
        ]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + content)
        self.transport.close()
