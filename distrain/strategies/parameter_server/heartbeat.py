"""Heartbeats between a worker and a server, and the reason why either of them goes."""

from __future__ import annotations

import selectors
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from distrain.communication.types import RankName
from distrain.errors import PeerLost, first_line
from distrain.strategies.parameter_server.protocol import Connection, FrameKind, ProtocolError

#: Heartbeats that are sent within the timeout.
_HEARTBEATS_PER_TIMEOUT = 5
_MAX_JSON_BYTES = 1 << 16


@dataclass(frozen=True)
class Farewell:
    """Why the connection to a peer ended.

    Attributes:
        reason: The reason, for messages.
        culprit: The rank whose failure is the reason, where that is not the peer itself.
        expelled: The peer has excluded this rank from the run.
        finished: The peer has finished its work and said so.
        stop_reason: What stopped the peer, if it finished before the end of the training.
        fatal: The run must not continue without the peer.
        step: The last step of the culprit that the peer knows of; ``None`` if it knows of none.
    """

    reason: str
    culprit: RankName | None = None
    expelled: bool = False
    finished: bool = False
    stop_reason: str | None = None
    fatal: bool = False
    step: int | None = None


class HeartbeatMonitor:
    """Sends heartbeats to a peer, listens for the peer's, and reports when they end.

    The connection of a killed peer ends at once. The heartbeats of a peer that is stopped, or whose host or network has
    failed, stay away.

    Args:
        connection: Used for heartbeats alone.
        timeout_seconds: The longest time without a heartbeat from the peer.
        on_end: Called once, by the monitor's thread, when the connection has ended.
    """

    def __init__(self, connection: Connection, timeout_seconds: float, on_end: Callable[[Farewell], None]) -> None:
        self._connection = connection
        self._timeout = timeout_seconds
        self._on_end = on_end
        self._farewell: Farewell | None = None
        self._leaving = False
        # A peer may also stop in the middle of a frame.
        connection.socket.settimeout(timeout_seconds)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def report_failure(
        self,
        reason: str,
        *,
        culprit: RankName | None = None,
        expelled: bool = False,
        fatal: bool = False,
        step: int | None = None,
    ) -> None:
        """Tells the peer why this rank ends the connection; the arguments are those of :class:`Farewell`.

        Raises:
            OSError: The connection has already ended.
        """
        culprit_fields = None if culprit is None else [culprit.rank, culprit.host]
        meta = {"reason": reason, "culprit": culprit_fields, "expelled": expelled, "fatal": fatal, "step": step}
        self._connection.send(FrameKind.FAILURE, meta)

    def leave(self, stop_reason: str | None = None) -> None:
        """Tells the peer that this rank has finished; the peer answers with its own farewell.

        Args:
            stop_reason: What stopped this rank, if it finished before the end of the training.

        Raises:
            OSError: The connection has already ended.
        """
        self._leaving = True
        self._connection.send(FrameKind.FAREWELL, {"stopped": stop_reason} if stop_reason else None)

    def shut_down(self) -> None:
        """Ends the connection."""
        self._connection.shut_down()

    def wait_for_farewell(self, seconds: float) -> Farewell:
        """Waits up to ``seconds`` for the connection to end, ends it if it hasn't, and returns why it ended."""
        self._thread.join(seconds)
        self.shut_down()
        self._thread.join()
        assert self._farewell is not None, "the thread sets the farewell before it ends"
        return self._farewell

    def _run(self) -> None:
        self._farewell = self._listen()
        self._on_end(self._farewell)
        self._connection.close()

    def _listen(self) -> Farewell:
        interval = self._timeout / _HEARTBEATS_PER_TIMEOUT
        last_received, last_sent = time.monotonic(), float("-inf")
        last_turn = last_received
        with selectors.DefaultSelector() as selector:
            selector.register(self._connection.socket, selectors.EVENT_READ)
            try:
                while True:
                    now = time.monotonic()
                    if now - last_turn > self._timeout / 2:
                        # This process was itself stopped for a while, and so perhaps was the peer.
                        last_received = now
                    last_turn = now
                    if now - last_sent >= interval:
                        self._connection.send(FrameKind.HEARTBEAT)
                        last_sent = time.monotonic()
                    if selector.select(interval):
                        frame = self._connection.receive(
                            FrameKind.HEARTBEAT,
                            FrameKind.FAILURE,
                            FrameKind.FAREWELL,
                            max_json_bytes=_MAX_JSON_BYTES,
                        )
                        self._connection.read_body(frame, 0)
                        last_received = time.monotonic()
                        if frame.kind is FrameKind.FAREWELL:
                            if not self._leaving:
                                self._connection.send(FrameKind.FAREWELL)
                            stopped = frame.meta.get("stopped")
                            return Farewell("it finished", finished=True, stop_reason=str(stopped) if stopped else None)
                        if frame.kind is FrameKind.FAILURE:
                            return _parse_failure(frame.meta)
                    elif now - last_received > self._timeout:
                        return self._timeout_farewell()
            except TimeoutError:
                return self._timeout_farewell()
            except OSError:
                return Farewell("the connection broke off")
            except ProtocolError as error:
                return Farewell(str(error))

    def _timeout_farewell(self) -> Farewell:
        return Farewell(f"no sign of life for {self._timeout:g} s")


def _parse_failure(meta: dict[str, object]) -> Farewell:
    fields = meta.get("culprit")
    culprit = None
    if isinstance(fields, list) and len(fields) == 2 and isinstance(fields[0], int):
        culprit = RankName(fields[0], str(fields[1]))
    step = meta.get("step")
    return Farewell(
        str(meta.get("reason")),
        culprit,
        expelled=meta.get("expelled") is True,
        fatal=meta.get("fatal") is True,
        step=step if isinstance(step, int) else None,
    )


def failure_reason(error: BaseException) -> tuple[str, RankName | None]:
    """Describes to peers an error that ends this rank.

    Returns:
        The reason in one line, and the rank whose failure caused the error, or ``None`` if that is this rank.
    """
    if isinstance(error, PeerLost):
        return error.reason, RankName(error.rank, error.host)
    return f"{type(error).__name__}: {first_line(error)}".removesuffix(": "), None
