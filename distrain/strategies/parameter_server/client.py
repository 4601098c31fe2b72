"""The worker's side: pushes a shard's gradients to its server as the backward pass completes them, and pulls."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor, nn

from distrain.communication.collectives import Ledger
from distrain.communication.types import RankName
from distrain.compression.base import MessageCompressor
from distrain.compression.bucket import Bucket
from distrain.errors import PeerLost
from distrain.reporting.metrics import Stopwatch
from distrain.strategies.parameter_server.heartbeat import Pulse, Word, last_word_of
from distrain.strategies.parameter_server.protocol import Connection, Frame, Kind
from distrain.strategies.parameter_server.server import described, packed, receive_state
from distrain.strategies.parameter_server.shards import Packed

log = logging.getLogger(__name__)

#: How long a connection that broke off may wait for the words that explain it.
_EXPLANATION_SECONDS = 2.0
#: Of the last answer in the running mean of how long answers took.
_WEIGHT = 0.2


class Expelled(RuntimeError):
    """The servers gave this worker up and go on without it."""


class Link:
    """A worker's connections to one server, and the shard of the model that lies there.

    A push is a row of frames, one a bucket, each sent as soon as it is complete; a thread of this link sends them and
    then waits for the answer, so the worker may compute meanwhile. Bytes are counted here for both directions, since
    servers have no steps to count them in.

    Args:
        server: Who is at the other end.
        connections: By channel.
        named: The shard's parameters by name.
        compressor: Writes the messages; it keeps what they leave out.
        stopwatch: Where the time spent compressing is booked.
        ledger: Where bytes are counted.
        silence_seconds: How long the server may give no sign of life.

    Attributes:
        version: Updates that the server had done when it sent the parameters that the worker has.
        seconds: How long answers took lately, from the end of the backward pass on, less what the server held back.
        lost: What the server says of workers that are gone, by rank.
        wish: What this worker wishes all to do (:class:`distrain.runtime.consensus.Request`), sent with the next push.
        servers_wish: What the server wishes.
        decided: Of the last decision: the step after which, and the wishes.
    """

    def __init__(
        self,
        server: RankName,
        connections: Mapping[str, Connection],
        named: Mapping[str, nn.Parameter],
        compressor: MessageCompressor,
        stopwatch: Stopwatch,
        ledger: Ledger,
        silence_seconds: float,
    ) -> None:
        self.server = server
        self.named = named
        self.version = 0
        self.seconds = 0.0
        self.lost: dict[int, dict[str, Any]] = {}
        self.wish = self.servers_wish = 0
        self.decided = (0, 0)
        self._connections = connections
        self._compressor = compressor
        self._stopwatch = stopwatch
        self._ledger = ledger
        self._room = Packed(list(named.values()))
        self._thread = ThreadPoolExecutor(1)
        self._asked: Future[Frame] | None = None
        self._head: dict[str, Any] | None = None
        self._index = 0
        self._pulse = Pulse(connections["pulse"], silence_seconds, self._ended)

    @property
    def bytes(self) -> int:
        """Size of the shard's parameters."""
        return self._room.bytes.numel()

    # --- what Gradients asks of what carries its buckets -------------------------------------------------------------

    def begin_last_backward(self) -> None:
        """Nothing to prepare: :meth:`begin` has."""

    def start(self, bucket: Bucket) -> None:
        """Sends a bucket of the step that :meth:`begin` began; it may be changed at once."""
        if self._head is not None:
            self._send(Kind.PUSH, self._head, None)
            self._head = None
        with self._stopwatch.compression():
            payload = self._compressor.encode(bucket).cpu()
        self._ledger.sent["push"] += payload.numel()
        self._send(Kind.BUCKET, {"index": self._index}, payload)
        self._index += 1

    def finish(self) -> None:
        """Nothing to wait for: the answer is taken by :meth:`take`."""

    # --- a step ------------------------------------------------------------------------------------------------------

    def begin(self, step: int, rate: float, count: int, share: float) -> None:
        """Says what the next buckets are.

        Args:
            step: The compressor's.
            rate: Learning rate of a whole batch's update.
            count: Samples in this worker's share.
            share: What part of the batch they are.
        """
        self._head = {
            "step": step, "rate": rate, "count": count, "share": share, "version": self.version, "wish": self.wish
        }  # fmt: skip
        self._index = 0

    def ask(self) -> None:
        """After a push: lets the link's thread wait for the parameters that answer it."""
        self._asked = self._thread.submit(self._receive, time.perf_counter())
        self._ledger.sent["pull"] += self.bytes

    def square(self) -> float:
        """After a push that is to be clipped: squared norm of the summed gradient of this shard."""
        with self._explained():
            return self._thread.submit(self._receive_square).result()

    def answer(self, norm: float) -> None:
        """Tells the server the norm over all shards."""
        self._send(Kind.NORM, {"norm": norm}, None)

    def pull(self) -> None:
        """Asks for the newest parameters, without a push."""
        self._send(Kind.PULL, None, None)
        self.ask()

    def take(self) -> None:
        """Waits for the parameters that were asked for, if any were, and gives them to the model."""
        if self._asked is None:
            return
        with self._explained():
            frame = self._asked.result()
        self._asked = None
        self.version = frame.whole("version")
        self.lost = {int(told["rank"]): told for told in frame.meta.get("lost", [])}
        self.servers_wish, self.decided = frame.whole("wish"), (frame.whole("decided"), frame.whole("wishes"))
        self._room.unpack()

    def _send(self, kind: Kind, meta: Mapping[str, Any] | None, body: Tensor | None) -> None:
        # What goes wrong in there also goes wrong in the task after it, which is waited for.
        self._thread.submit(self._connections["work"].send, kind, meta, body)

    def _receive(self, asked: float) -> Frame:
        frame = self._connections["work"].receive(Kind.PARAMETERS)
        self._connections["work"].read_into(frame, self._room.bytes)
        took = time.perf_counter() - asked - frame.real("waited")
        self.seconds += _WEIGHT * (took - self.seconds)
        return frame

    def _receive_square(self) -> float:
        frame = self._connections["work"].receive(Kind.NORM)
        self._connections["work"].read(frame, 0)
        return frame.real("square")

    # --- everything else ---------------------------------------------------------------------------------------------

    def talk(
        self,
        kind: Kind,
        meta: Mapping[str, Any] | None = None,
        body: Tensor | None = None,
        answer: Kind | None = None,
        expected: Callable[[Frame], int] = lambda _: 0,
    ) -> tuple[Frame, Tensor]:
        """Asks something and waits for the answer.

        Args:
            kind: Of the frame that asks.
            meta: Its JSON.
            body: Its bytes.
            answer: Kind of the answer; by default the same.
            expected: How many bytes an answer with this JSON may have.

        Raises:
            PeerLost: The server is gone, or says who else is.
        """
        connection = self._connections["talk"]
        with self._explained():
            connection.send(kind, meta, body)
            frame = connection.receive(answer or kind)
            return frame, connection.read(frame, expected(frame))

    def fetch_optimizer(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What the server's optimizer keeps; see :func:`distrain.strategies.parameter_server.server.receive_state`."""
        connection = self._connections["talk"]
        with self._explained():
            connection.send(Kind.STATE)
            return receive_state(connection, self.named)

    def load(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Gives the server the model's parameters of its shard, and its optimizer's state."""
        connection = self._connections["talk"]
        mine = {key: tensor for key, tensor in tensors.items() if key.rpartition("/")[0] in self.named}
        told = {key: value for key, value in scalars.items() if key.rpartition("/")[0] in self.named}
        with self._explained():
            connection.send(Kind.LOAD, None, self._room.pack())
            connection.send(Kind.STATE, {"tensors": described(mine), "scalars": told}, packed(mine))
            connection.read(connection.receive(Kind.DONE), 0)

    # --- the end -----------------------------------------------------------------------------------------------------

    def leave(self, stopped: str | None = None) -> None:
        """Tells the server that this worker is done, and waits until it has heard.

        Args:
            stopped: By what, if before its time.
        """
        with self._explained():
            self._pulse.leave(stopped)
        word = self._pulse.last_word(_EXPLANATION_SECONDS)
        if not word.left:
            log.warning("the server, %s, went before this worker's leave: %s", self.server, word.reason)
        self._close()

    def abandon(self, error: BaseException, *, fatal: bool = False) -> None:
        """Tells the server why this worker fails, and cuts the connections.

        Args:
            error: Why.
            fatal: The others must not go on without it.
        """
        reason, culprit = last_word_of(error)
        with contextlib.suppress(OSError):
            self._pulse.say(reason, culprit=culprit, fatal=fatal)
        self._close()

    def _close(self) -> None:
        self._pulse.cut()
        self._cut()
        self._thread.shutdown(cancel_futures=True)
        for channel in ("work", "talk"):
            self._connections[channel].close()

    def _cut(self) -> None:
        for channel in ("work", "talk"):
            self._connections[channel].cut()

    def _ended(self, word: Word) -> None:
        if not word.left:
            # Wakes up whoever waits for an answer that will not come.
            self._cut()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns a connection that breaks off into who is gone and why."""
        try:
            yield
        except OSError as error:
            word = self._pulse.last_word(_EXPLANATION_SECONDS)
            if word.expelled:
                raise Expelled(f"the server, {self.server}, gave this worker up: {word.reason}") from error
            culprit = word.culprit or self.server
            raise PeerLost(culprit.rank, culprit.host, word.reason) from error


class Links:
    """All links of a worker."""

    def __init__(self, links: list[Link]) -> None:
        self.links = links

    @property
    def seconds(self) -> float:
        """How long the answers of the slowest server took lately."""
        return max(link.seconds for link in self.links)

    def begin(self, step: int, rate: float, count: int, share: float) -> None:
        """See :meth:`Link.begin`."""
        for link in self.links:
            link.begin(step, rate, count, share)

    def ask(self) -> None:
        """See :meth:`Link.ask`."""
        for link in self.links:
            link.ask()

    def take(self) -> None:
        """See :meth:`Link.take`."""
        for link in self.links:
            link.take()

    def pull(self) -> None:
        """Takes the newest parameters from all servers."""
        for link in self.links:
            link.pull()
        self.take()

    def clip(self) -> float:
        """Lets the servers clip by the norm of the whole gradient, which is returned."""
        norm = math.sqrt(sum(link.square() for link in self.links))
        for link in self.links:
            link.answer(norm)
        return norm

    def norm(self) -> float:
        """Norm of the whole gradient that the servers applied last."""
        return math.sqrt(sum(link.talk(Kind.NORM)[0].real("square") for link in self.links))

    def leave(self, stopped: str | None = None) -> None:
        """See :meth:`Link.leave`."""
        for link in self.links:
            link.leave(stopped)

    def abandon(self, error: BaseException, *, fatal: bool = False) -> None:
        """See :meth:`Link.abandon`."""
        for link in self.links:
            link.abandon(error, fatal=fatal)
