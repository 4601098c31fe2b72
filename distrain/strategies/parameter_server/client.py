"""The worker's side: pushes gradients to the servers as the backward pass completes them, and pulls parameters."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor, nn

from distrain.communication.collectives import Ledger
from distrain.communication.types import RankName
from distrain.compression.base import MessageCompressor
from distrain.compression.bucket import Bucket
from distrain.errors import PeerLost
from distrain.reporting.metrics import Stopwatch
from distrain.strategies.parameter_server.heartbeat import Farewell, HeartbeatMonitor, failure_reason
from distrain.strategies.parameter_server.optimizer_wire import encode_optimizer_state, receive_optimizer_state
from distrain.strategies.parameter_server.protocol import Connection, Frame, FrameKind
from distrain.strategies.parameter_server.shards import ParameterBuffer, trained_among

log = logging.getLogger(__name__)

#: After a connection broke off: how long to wait for the peer's explanation.
_EXPLANATION_SECONDS = 2.0
#: Weight of the latest answer in the running mean of how long answers took.
_LATEST_WEIGHT = 0.2


class Expelled(RuntimeError):
    """A server has excluded this worker from the run, which continues without it."""


class ServerClient:
    """A worker's connections to one server, and the worker's copy of the shard that the server holds.

    A push is a sequence of frames, one for each bucket; each is sent as soon as its bucket is complete. A thread of the
    client's own sends them and then receives the answer, so the worker can compute meanwhile. The client counts the
    bytes of both directions, because a server has no steps by which it could count them.

    It is also a :class:`distrain.gradients.buckets.Carrier`: :class:`~distrain.gradients.buckets.Gradients` hands its
    buckets to it.

    Args:
        server: The server, for messages.
        connections: Connections to the server, by channel.
        parameters: The shard's parameters by name.
        compressor: Encodes the gradients; it keeps what the messages leave out.
        stopwatch: Records the time spent on compression.
        ledger: Counts bytes.
        heartbeat_timeout_seconds: The longest time without a heartbeat from the server.

    Attributes:
        server: The server.
        parameters: The shard's parameters by name.
        version: Number of updates that the server had made when it sent the parameters that the worker has.
        answer_seconds: Running mean of how long answers took, from the end of the backward pass on, without the time
            for which the server made the worker wait for slower ones.
        lost_workers: The server's records of the workers that are lost, by rank.
        requests: What this worker requests of all ranks (:class:`distrain.runtime.consensus.Request`); sent with the
            next push.
        server_requests: What the server requests of all ranks.
        decision: The server's latest decision: the step after which all ranks act, and the requests that they follow.
    """

    def __init__(
        self,
        server: RankName,
        connections: Mapping[str, Connection],
        parameters: Mapping[str, nn.Parameter],
        compressor: MessageCompressor,
        stopwatch: Stopwatch,
        ledger: Ledger,
        heartbeat_timeout_seconds: float,
    ) -> None:
        self.server = server
        self.parameters = parameters
        self.version = 0
        self.answer_seconds = 0.0
        self.lost_workers: dict[int, dict[str, Any]] = {}
        self.requests = self.server_requests = 0
        self.decision = (0, 0)
        self._connections = connections
        self._compressor = compressor
        self._stopwatch = stopwatch
        self._ledger = ledger
        self._buffer = ParameterBuffer(trained_among(parameters))
        self._thread = ThreadPoolExecutor(1)
        self._pending_answer: Future[Frame] | None = None
        self._push_header: dict[str, Any] | None = None
        self._next_bucket = 0
        self._monitor = HeartbeatMonitor(connections["heartbeat"], heartbeat_timeout_seconds, self._handle_farewell)

    @property
    def bytes(self) -> int:
        """Size of the shard's parameters that are trained now."""
        return self._buffer.data.numel()

    # --- the carrier of the gradients' buckets -----------------------------------------------------------------------

    def begin_last_backward(self) -> None:
        """Does nothing: :meth:`begin_push` has prepared the push."""

    def start(self, bucket: Bucket) -> None:
        """Sends a bucket of the push that :meth:`begin_push` began; the bucket may be changed at once."""
        self._send_header()
        with self._stopwatch.compression():
            payload = self._compressor.encode(bucket).cpu()
        self._ledger.sent["push"] += payload.numel()
        self._send(FrameKind.BUCKET, {"index": self._next_bucket}, payload)
        self._next_bucket += 1

    def finish(self) -> None:
        """Ends the push; :meth:`take_parameters` waits for the answer."""
        # Nothing of this shard may be trained now.
        self._send_header()

    def _send_header(self) -> None:
        if self._push_header is not None:
            self._send(FrameKind.PUSH, self._push_header, None)
            self._push_header = None

    # --- a step ------------------------------------------------------------------------------------------------------

    def begin_push(self, step: int, learning_rate: float, samples: int, share: float) -> None:
        """Prepares the push of the next buckets.

        Args:
            step: The compressor's step.
            learning_rate: Learning rate of a whole batch's update.
            samples: Number of samples in this worker's part of the batch.
            share: This part, from 0 to 1.
        """
        self._push_header = {
            "step": step,
            "learning_rate": learning_rate,
            "samples": samples,
            "share": share,
            "version": self.version,
            "requests": self.requests,
        }
        self._next_bucket = 0

    def start_receiving(self) -> None:
        """Call after a push: the client's thread begins to wait for the parameters that answer it."""
        self._pending_answer = self._thread.submit(self._receive_parameters, time.perf_counter())
        self._ledger.sent["pull"] += self.bytes

    def receive_squared_norm(self) -> float:
        """Call after a push that the server clips: returns the squared norm of the shard's summed gradient."""
        with self._explain_lost_connection():
            return self._thread.submit(self._receive_squared_norm).result()

    def send_global_norm(self, norm: float) -> None:
        """Sends the server the norm over all shards."""
        self._send(FrameKind.NORM, {"norm": norm}, None)

    def pull(self) -> None:
        """Requests the newest parameters without a push; :meth:`take_parameters` waits for them."""
        self._send(FrameKind.PULL, None, None)
        self.start_receiving()

    def take_parameters(self) -> None:
        """Waits for the parameters that were requested, if any, and copies them into the model.

        Raises:
            Expelled: The server has excluded this worker.
            PeerLost: The server, or another rank that the run needs, is lost.
        """
        if self._pending_answer is None:
            return
        with self._explain_lost_connection():
            frame = self._pending_answer.result()
        self._pending_answer = None
        self.version = frame.integer("version")
        self.lost_workers = {int(record["rank"]): record for record in frame.meta.get("lost", [])}
        self.server_requests = frame.integer("server_requests")
        self.decision = (frame.integer("decided_step"), frame.integer("decided_requests"))
        self._buffer.unpack()

    def _send(self, kind: FrameKind, meta: Mapping[str, Any] | None, body: Tensor | None) -> None:
        # The result is not waited for: if sending fails, receiving the answer fails too, and that is waited for.
        self._thread.submit(self._connections["parameters"].send, kind, meta, body)

    def _receive_parameters(self, started: float) -> Frame:
        frame = self._connections["parameters"].receive(FrameKind.PARAMETERS)
        self._connections["parameters"].read_body_into(frame, self._buffer.data)
        seconds = time.perf_counter() - started - frame.number("waited")
        self.answer_seconds += _LATEST_WEIGHT * (seconds - self.answer_seconds)
        return frame

    def _receive_squared_norm(self) -> float:
        frame = self._connections["parameters"].receive(FrameKind.NORM)
        self._connections["parameters"].read_body(frame, 0)
        return frame.number("square")

    # --- all other requests ------------------------------------------------------------------------------------------

    def request(
        self,
        kind: FrameKind,
        meta: Mapping[str, Any] | None = None,
        body: Tensor | None = None,
        answer_kind: FrameKind | None = None,
        expected_size: Callable[[Frame], int] = lambda _: 0,
    ) -> tuple[Frame, Tensor]:
        """Sends a request and waits for the answer.

        Args:
            kind: Kind of the request.
            meta: Its JSON.
            body: Its body, uint8 ``[bytes]``.
            answer_kind: Kind of the answer; by default the same.
            expected_size: Returns the size in bytes that the body of an answer must have.

        Returns:
            The answer and its body.

        Raises:
            Expelled: The server has excluded this worker.
            PeerLost: The server, or another rank that the run needs, is lost.
        """
        connection = self._connections["requests"]
        with self._explain_lost_connection():
            connection.send(kind, meta, body)
            frame = connection.receive(answer_kind or kind)
            return frame, connection.read_body(frame, expected_size(frame))

    def request_trained(self) -> None:
        """Makes the server train those of its parameters that require a gradient in this worker's model."""
        names = [name for name, parameter in self.parameters.items() if parameter.requires_grad]
        self.request(FrameKind.TRAINED, {"names": names}, answer_kind=FrameKind.DONE)

    def trained_changed(self) -> None:
        """Call when other parameters of this worker's model require a gradient, and nothing is under way."""
        self._buffer = ParameterBuffer(trained_among(self.parameters))

    def fetch_optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Fetches the state of the server's optimizer.

        Returns:
            As :func:`distrain.strategies.parameter_server.optimizer_wire.receive_optimizer_state`.
        """
        connection = self._connections["requests"]
        with self._explain_lost_connection():
            connection.send(FrameKind.STATE)
            return receive_optimizer_state(connection, self.parameters)

    def load(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Sends the server the model's parameters and the optimizer's state, of which it gets its shard's part.

        Args:
            tensors: The whole model's optimizer state, by ``<parameter name>/<state name>``.
            scalars: Its other values, by the same kind of name.
        """
        connection = self._connections["requests"]
        shard_tensors = {name: tensor for name, tensor in tensors.items() if self._holds(name)}
        shard_scalars = {name: value for name, value in scalars.items() if self._holds(name)}
        with self._explain_lost_connection():
            connection.send(FrameKind.LOAD, None, ParameterBuffer(list(self.parameters.values())).pack())
            connection.send(FrameKind.STATE, *encode_optimizer_state(shard_tensors, shard_scalars))
            connection.read_body(connection.receive(FrameKind.DONE), 0)

    def _holds(self, state_name: str) -> bool:
        return state_name.rpartition("/")[0] in self.parameters

    # --- the end -----------------------------------------------------------------------------------------------------

    def leave(self, stop_reason: str | None = None) -> None:
        """Tells the server that this worker has finished, and waits for the server's farewell.

        Args:
            stop_reason: What stopped the worker, if it finished before the end of the training.
        """
        with self._explain_lost_connection():
            self._monitor.leave(stop_reason)
        farewell = self._monitor.wait_for_farewell(_EXPLANATION_SECONDS)
        if not farewell.finished:
            log.warning("the server, %s, ended before this worker could leave: %s", self.server, farewell.reason)
        self._close()

    def abandon(self, error: BaseException, *, fatal: bool = False) -> None:
        """Tells the server why this worker fails, and ends the connections.

        Args:
            error: The reason.
            fatal: The other workers must not continue without this one.
        """
        reason, culprit = failure_reason(error)
        with contextlib.suppress(OSError):
            self._monitor.report_failure(reason, culprit=culprit, fatal=fatal)
        self._close()

    def _close(self) -> None:
        self._monitor.shut_down()
        self._shut_down()
        self._thread.shutdown(cancel_futures=True)
        for channel in ("parameters", "requests"):
            self._connections[channel].close()

    def _shut_down(self) -> None:
        for channel in ("parameters", "requests"):
            self._connections[channel].shut_down()

    def _handle_farewell(self, farewell: Farewell) -> None:
        if not farewell.finished:
            # Wakes a thread that waits for an answer which will not come.
            self._shut_down()

    @contextlib.contextmanager
    def _explain_lost_connection(self) -> Iterator[None]:
        """Turns the error of a connection that broke off into one that says which rank is lost and why."""
        try:
            yield
        except OSError as error:
            farewell = self._monitor.wait_for_farewell(_EXPLANATION_SECONDS)
            if farewell.expelled:
                raise Expelled(f"the server, {self.server}, excluded this worker: {farewell.reason}") from error
            culprit = farewell.culprit or self.server
            raise PeerLost(culprit.rank, culprit.host, farewell.reason, farewell.step) from error


class ServerClients:
    """A worker's clients of all servers; each method does to all of them what :class:`ServerClient` does to one.

    Attributes:
        clients: One for each server.
    """

    def __init__(self, clients: list[ServerClient]) -> None:
        self.clients = clients

    @property
    def answer_seconds(self) -> float:
        """Running mean of how long the answers of the slowest server took."""
        return max(client.answer_seconds for client in self.clients)

    def begin_push(self, step: int, learning_rate: float, samples: int, share: float) -> None:
        """Prepares a push; see :meth:`ServerClient.begin_push`."""
        for client in self.clients:
            client.begin_push(step, learning_rate, samples, share)

    def start_receiving(self) -> None:
        """Begins to wait for the answers to a push."""
        for client in self.clients:
            client.start_receiving()

    def take_parameters(self) -> None:
        """Waits for the parameters that were requested, if any, and copies them into the model."""
        for client in self.clients:
            client.take_parameters()

    def pull(self) -> None:
        """Requests the newest parameters, waits for them and copies them into the model."""
        for client in self.clients:
            client.pull()
        self.take_parameters()

    def exchange_norms(self) -> float:
        """Adds up the norm of the whole gradient and sends it to the servers, which clip by it.

        Returns:
            The norm.
        """
        norm = math.sqrt(sum(client.receive_squared_norm() for client in self.clients))
        for client in self.clients:
            client.send_global_norm(norm)
        return norm

    def gradient_norm(self) -> float:
        """Requests the norm of the whole gradient that the servers applied last."""
        return math.sqrt(sum(client.request(FrameKind.NORM)[0].number("square") for client in self.clients))

    def leave(self, stop_reason: str | None = None) -> None:
        """Tells all servers that this worker has finished; see :meth:`ServerClient.leave`."""
        for client in self.clients:
            client.leave(stop_reason)

    def abandon(self, error: BaseException, *, fatal: bool = False) -> None:
        """Tells all servers why this worker fails; see :meth:`ServerClient.abandon`."""
        for client in self.clients:
            client.abandon(error, fatal=fatal)

    def warn_of_lost_workers(self, known: Set[int]) -> set[int]:
        """Names the workers that servers have lost in the log, each once.

        Args:
            known: Ranks of lost workers that were named before.

        Returns:
            The ranks that were not.
        """
        found: set[int] = set()
        for client in self.clients:
            for rank, record in client.lost_workers.items():
                if rank not in known | found:
                    found.add(rank)
                    log.warning(
                        "WORKER LOST: rank %d on %s is gone after %d steps (%s); the others go on without its samples",
                        rank,
                        record["host"],
                        record["steps"],
                        record["lost"],
                    )
        return found
