"""A server: holds a shard of the parameters, applies the gradients that workers push, and answers pulls.

Sources: for servers, workers, push and pull, Li et al. 2014, "Scaling distributed machine learning with the parameter
server" (OSDI); for asynchronous updates, Dean et al. 2012, "Large scale distributed deep networks" (NIPS), §4.1; for
bounded staleness, Ho et al. 2013, "More effective distributed ML via a stale synchronous parallel parameter server"
(NIPS).
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from distrain.communication.types import RankName
from distrain.errors import PeerLost
from distrain.gradients.clip import clip_gradient_norm
from distrain.strategies.parameter_server.collectives import CollectiveServer
from distrain.strategies.parameter_server.connect import CHANNELS
from distrain.strategies.parameter_server.heartbeat import Farewell, HeartbeatMonitor, failure_reason
from distrain.strategies.parameter_server.optimizer_wire import receive_optimizer_state
from distrain.strategies.parameter_server.protocol import Connection, Frame, FrameKind
from distrain.strategies.parameter_server.push import Push, receive_push
from distrain.strategies.parameter_server.server_policy import ServerPolicy
from distrain.strategies.parameter_server.server_shard import ServerShard
from distrain.strategies.parameter_server.shards import ParameterBuffer
from distrain.strategies.parameter_server.stop_decision import StopDecision
from distrain.strategies.parameter_server.worker_record import RecentStaleness, WorkerRecord

log = logging.getLogger(__name__)


class _ServerStopped(Exception):
    """Raised in a thread that waits when the server stops; it ends the thread."""


class Server:
    """Serves until every worker has finished or is lost.

    Every connection has its own thread, which blocks in it, so a slow worker delays no other. One lock guards the state
    that the threads share. It is held while gradients are applied and parameters copied, never while data is sent or
    received.

    Args:
        name: This rank.
        shard: The part of the model that it holds.
        policy: How it treats workers.
        workers: All workers.
        connections: The workers' connections, by rank and channel.
        on_worker_lost: Called once for every worker that is lost.
        own_requests: Returns what this server requests of all ranks, as bits of
            :class:`distrain.runtime.consensus.Request`.

    Attributes:
        shard: The part of the model that it holds.
        workers: Records of all workers, by rank.
        version: Number of updates so far, including skipped ones.
        stop_reason: What stopped the run before the end of the training; ``None`` if nothing has.
    """

    def __init__(
        self,
        name: RankName,
        shard: ServerShard,
        policy: ServerPolicy,
        workers: Sequence[RankName],
        connections: Mapping[tuple[int, str], Connection],
        on_worker_lost: Callable[[WorkerRecord], None],
        own_requests: Callable[[], int] = lambda: 0,
        on_push: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.shard = shard
        self.workers = {worker.rank: WorkerRecord(worker) for worker in workers}
        self.version = 0
        self.stop_reason: str | None = None
        self._name = name
        self._policy = policy
        self._on_worker_lost = on_worker_lost
        self._own_requests = own_requests
        self._on_push = on_push
        self._changed = threading.Condition(threading.RLock())
        self._error: BaseException | None = None
        self._stop_decision = StopDecision(policy.in_flight)
        self._collectives = CollectiveServer(
            [worker.rank for worker in workers], self._changed, policy.max_collective_bytes
        )
        # The pushes of the current step that have arrived, by rank; sync only.
        self._pending_pushes: dict[int, Push] = {}
        self._summed_steps = 0
        self._squared_norm = 0.0
        self._skipped_updates = 0
        self._recent_staleness = RecentStaleness()
        self._connections = connections
        self._monitors: dict[int, HeartbeatMonitor] = {}
        # With the lock held, since a thread may need another worker's monitor as soon as it runs.
        with self._changed:
            for rank, worker in self.workers.items():
                self._monitors[rank] = HeartbeatMonitor(
                    connections[rank, "heartbeat"], policy.heartbeat_timeout_seconds, self._farewell_handler(worker)
                )
                for channel, handler in (("parameters", self._serve_parameters), ("requests", self._serve_requests)):
                    arguments = (handler, worker, connections[rank, channel])
                    threading.Thread(target=self._run_handler, args=arguments, daemon=True).start()

    # --- the life of the server --------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Waits until every worker has finished or is lost.

        Raises:
            PeerLost: A worker is lost and the run can't continue without it.
        """
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._error is not None or not self._living())
                if self._error is not None:
                    raise self._error
        except BaseException as error:
            with self._changed:
                self._stop(error)
            reason, culprit = failure_reason(error)
            step = error.step if isinstance(error, PeerLost) else None
            for rank, worker in self.workers.items():
                if worker.is_alive:
                    self._report_failure(rank, reason, culprit=culprit or self._name, step=step)
            raise
        finally:
            for connection in self._connections.values():
                connection.shut_down()

    def steps(self) -> int:
        """Steps that the fastest worker has finished."""
        return max(worker.steps for worker in self.workers.values())

    def log_workers(self) -> None:
        """Logs what each worker did."""
        for worker in self.workers.values():
            log.info(
                "worker %s: %d steps, %d samples, staleness %s, pushed %.1f MB, pulled %.1f MB",
                worker.peer,
                worker.steps,
                worker.samples,
                dict(sorted(worker.staleness.items())),
                worker.pushed_bytes / 1e6,
                worker.pulled_bytes / 1e6,
            )

    def _living(self) -> list[WorkerRecord]:
        return [worker for worker in self.workers.values() if worker.is_alive]

    def _stop(self, error: BaseException) -> None:
        self._error = self._error or error
        self._changed.notify_all()

    def _farewell_handler(self, worker: WorkerRecord) -> Callable[[Farewell], None]:
        def handle(farewell: Farewell) -> None:
            if farewell.finished:
                with self._changed:
                    worker.finished = True
                    self.stop_reason = self.stop_reason or farewell.stop_reason
                    self._changed.notify_all()
            else:
                self._lose_worker(worker, farewell)

        return handle

    def _lose_worker(self, worker: WorkerRecord, farewell: Farewell) -> None:
        rank, reason = worker.peer.rank, farewell.reason
        with self._changed:
            if not worker.is_alive or self._error is not None:
                return
            culprit = farewell.culprit or worker.peer
            worker.loss_reason = reason if farewell.culprit is None else f"it lost {farewell.culprit}: {reason}"
            if self._policy.mode == "sync" or rank == 0 or farewell.fatal:
                step = self.workers[culprit.rank].step if culprit.rank in self.workers else None
                self._stop(PeerLost(culprit.rank, culprit.host, reason, step))
            else:
                # The rank that this worker reports as lost may still be connected to the others. If it isn't, they
                # report it too.
                self._collectives.remove_worker(rank)
                self._on_worker_lost(worker)
            self._changed.notify_all()
        self._report_failure(rank, reason, expelled=True)
        for channel in CHANNELS:
            self._connections[rank, channel].shut_down()

    def _report_failure(
        self,
        rank: int,
        reason: str,
        *,
        culprit: RankName | None = None,
        expelled: bool = False,
        step: int | None = None,
    ) -> None:
        try:
            self._monitors[rank].report_failure(reason, culprit=culprit, expelled=expelled, step=step)
        except OSError:
            log.info("worker %s could not be told why its connection ends", self.workers[rank].peer)

    def _run_handler(
        self, handler: Callable[[WorkerRecord, Connection], None], worker: WorkerRecord, connection: Connection
    ) -> None:
        try:
            handler(worker, connection)
        except _ServerStopped:
            return
        except OSError:
            # The heartbeat monitor learns the reason, if it hasn't yet, and handles it.
            self._monitors[worker.peer.rank].wait_for_farewell(1.0)
        except BaseException as error:
            with self._changed:
                self._stop(error)
        finally:
            connection.close()

    def _wait_until(self, condition: Callable[[], bool], awaited: Callable[[], Iterable[int]]) -> None:
        """Waits, with the lock held, until a condition is true; stops the server if that takes too long.

        Args:
            condition: The condition.
            awaited: Returns the ranks that are waited for, for the error message.

        Raises:
            _ServerStopped: The server stops.
        """
        limit = self._policy.timeout_seconds
        if not self._changed.wait_for(lambda: condition() or self._error is not None, limit):
            names = ", ".join(str(self.workers[rank].peer) for rank in sorted(awaited()))
            self._stop(RuntimeError(f"waited longer than {limit:g} s for {names}"))
        if self._error is not None:
            raise _ServerStopped

    # --- pushes and pulls --------------------------------------------------------------------------------------------

    def _serve_parameters(self, worker: WorkerRecord, connection: Connection) -> None:
        buffer = ParameterBuffer([])
        while True:
            frame = connection.receive(FrameKind.PUSH, FrameKind.PULL)
            connection.read_body(frame, 0)
            waited = 0.0
            if frame.kind is FrameKind.PUSH:
                with self._changed:
                    payload_sizes = self.shard.payload_sizes(frame.integer("step"))
                push = receive_push(connection, frame, payload_sizes)
                worker.pushed_bytes += sum(payload.numel() for payload in push.payloads)
                if self._policy.mode == "sync":
                    self._apply_sync(worker, push, connection)
                else:
                    waited = self._apply_async(worker, push)
            with self._changed:
                if frame.kind is FrameKind.PUSH:
                    all_pushes = [living.steps for living in self._living()]
                    self._stop_decision.add_request(frame.integer("requests"), worker.steps, all_pushes)
                meta = {
                    "version": self.version,
                    "waited": waited,
                    "lost": [record.loss_record() for record in self.workers.values() if record.loss_reason],
                    "server_requests": self._own_requests(),
                    "decided_step": self._stop_decision.step,
                    "decided_requests": self._stop_decision.requests,
                }
                # Compared by identity: another epoch may train other parameters.
                if [*map(id, buffer.parameters)] != [*map(id, self.shard.trained)]:
                    buffer = ParameterBuffer(self.shard.trained)
                parameters = buffer.pack()
            connection.send(FrameKind.PARAMETERS, meta, parameters)
            worker.pulled_bytes += parameters.numel()

    def _apply_async(self, worker: WorkerRecord, push: Push) -> float:
        """Applies a push at once; in ssp then waits while the worker is too far ahead of the slowest one.

        Returns:
            How long it waited, in seconds.
        """
        with self._changed:
            if not worker.is_alive:
                # The worker was expelled while its last push was on the way.
                raise ConnectionError(f"worker {worker.peer} is gone")
            staleness = self.version - push.version
            worker.staleness[staleness] += 1
            self._recent_staleness.add(staleness)
            # A push without samples has no gradient, but an optimizer with momentum would still move the parameters.
            if push.samples:
                self.shard.sum_pushes([push])
                if self._policy.on_nonfinite == "stop" and not bool(self.shard.gradients.norm().isfinite()):
                    reason = f"NonFinite: its gradient in step {push.step} is not finite"
                    raise PeerLost(worker.peer.rank, worker.peer.host, reason)
                # Applies the mean gradient of the worker's samples with the worker's part of the learning rate.
                self.shard.gradients.scale(torch.tensor(1 / push.share))
                self._update(push.learning_rate * push.share)
            worker.add_push(push.step, push.samples)
            self._on_push(push.step)
            self._changed.notify_all()
            started = time.perf_counter()
            if self._policy.staleness is not None:
                # The parameters in the answer are for the step after those in flight.
                required = worker.steps + self._policy.in_flight - self._policy.staleness
                self._wait_until(lambda: not self._slower_than(required), lambda: self._slower_than(required))
            slowest = min(record.steps for record in [*self._living(), worker])
            worker.max_lead = max(worker.max_lead, worker.steps + self._policy.in_flight - slowest)
            return time.perf_counter() - started

    def _slower_than(self, steps: int) -> set[int]:
        """Ranks of the living workers that have finished fewer steps."""
        return {worker.peer.rank for worker in self._living() if worker.steps < steps}

    def _apply_sync(self, worker: WorkerRecord, push: Push, connection: Connection) -> None:
        """Waits for all workers' pushes of a step and applies their sum."""
        with self._changed:
            for other in self._pending_pushes.values():
                if (other.step, other.learning_rate) != (push.step, push.learning_rate):
                    raise RuntimeError(f"{worker.peer} is at step {push.step}, another worker at {other.step}")
            self._pending_pushes[worker.peer.rank] = push
            worker.add_push(push.step, push.samples)
            self._on_push(push.step)
            worker.staleness[self.version - push.version] += 1
            next_version = self.version + 1
            if len(self._pending_pushes) == len(self.workers):
                # In order of rank, so that the sum has the same bits in every run.
                self.shard.sum_pushes([self._pending_pushes[rank] for rank in sorted(self._pending_pushes)])
                self._pending_pushes.clear()
                self._summed_steps += 1
                if not self._policy.needs_global_norm:
                    self._update(push.learning_rate)
                else:
                    self._squared_norm = self.shard.squared_norm()
                self._changed.notify_all()
            self._wait_until(
                lambda: self._summed_steps >= next_version, lambda: set(self.workers) - set(self._pending_pushes)
            )
            squared_norm = self._squared_norm
        if self._policy.needs_global_norm:
            # The workers add up the norms of all servers' shards and send the total back.
            connection.send(FrameKind.NORM, {"square": squared_norm})
            answer = connection.receive(FrameKind.NORM)
            connection.read_body(answer, 0)
            with self._changed:
                # All workers send the same norm, so the first answer is enough.
                if self.version < next_version:
                    self._update_clipped(push.learning_rate, answer.number("norm"))

    def _update_clipped(self, learning_rate: float, norm: float) -> None:
        """Clips by the norm of the whole model's gradient and updates; skips an update that is not finite."""
        if self._policy.on_nonfinite != "stop" and not math.isfinite(norm):
            # Counts as a version, so that the workers' next pushes are pushes of the next step.
            self.version += 1
            self._skipped_updates += 1
            self._changed.notify_all()
        else:
            global_norm = torch.tensor(norm, dtype=torch.float64)
            clip_gradient_norm(self.shard.gradients, self._policy.max_gradient_norm, global_norm)
            self._update(learning_rate)

    def _update(self, learning_rate: float) -> None:
        self.shard.step(learning_rate)
        self.version += 1
        self._changed.notify_all()

    # --- all other requests ------------------------------------------------------------------------------------------

    def _serve_requests(self, worker: WorkerRecord, connection: Connection) -> None:
        rank, collectives = worker.peer.rank, self._collectives
        while True:
            frame = connection.receive(
                FrameKind.COLLECTIVE,
                FrameKind.SEND,
                FrameKind.RECEIVE,
                FrameKind.NORM,
                FrameKind.STATISTICS,
                FrameKind.STATE,
                FrameKind.LOAD,
                FrameKind.TRAINED,
            )
            if frame.kind is FrameKind.COLLECTIVE:
                contribution = collectives.read_body(connection, frame)
                result = collectives.join(rank, frame, contribution, self._wait_until)
                connection.send(FrameKind.RESULT, result.meta, result.body)
            elif frame.kind is FrameKind.SEND:
                collectives.store_message(rank, frame, collectives.read_body(connection, frame))
                connection.send(FrameKind.DONE)
            elif frame.kind is FrameKind.LOAD:
                self._load(frame, connection)
                connection.send(FrameKind.DONE)
            else:
                connection.read_body(frame, 0)
                if frame.kind is FrameKind.RECEIVE:
                    message = collectives.take_message(rank, frame, self._wait_until)
                    connection.send(FrameKind.RESULT, None, message)
                elif frame.kind is FrameKind.STATE:
                    with self._changed:
                        meta, body = self.shard.encode_optimizer_state()
                    connection.send(FrameKind.STATE, meta, body)
                elif frame.kind is FrameKind.NORM:
                    with self._changed:
                        squared_norm = self.shard.squared_norm()
                    connection.send(FrameKind.NORM, {"square": squared_norm})
                elif frame.kind is FrameKind.TRAINED:
                    self._set_trained(frame)
                    connection.send(FrameKind.DONE)
                else:
                    connection.send(FrameKind.STATISTICS, self._statistics(frame))

    def _statistics(self, frame: Frame) -> dict[str, Any]:
        """Statistics of all workers; with ``recent``, only the staleness since the last such request."""
        with self._changed:
            if frame.meta.get("recent"):
                recent, self._recent_staleness = self._recent_staleness, RecentStaleness()
                return {"pushes": recent.pushes, "staleness_sum": recent.total, "staleness_max": recent.maximum}
            return {
                "workers": [worker.statistics() for worker in self.workers.values()],
                "updates": self.version - self._skipped_updates,
                "tensors": len(self.shard.parameters),
                "bytes": self.shard.bytes,
            }

    def _set_trained(self, frame: Frame) -> None:
        """Trains other parameters of the shard from now on. The workers wait for each other before and after it."""
        names = frame.meta.get("names")
        if not isinstance(names, list) or not all(name in self.shard.parameters for name in names):
            raise frame.protocol_error(f"{names!r} are not names of this shard's parameters")
        with self._changed:
            self.shard.set_trained(names)

    def _load(self, frame: Frame, connection: Connection) -> None:
        """Receives parameters and the optimizer's state and replaces the shard's."""
        buffer = ParameterBuffer(list(self.shard.parameters.values()))
        connection.read_body_into(frame, buffer.data)
        tensors, scalars = receive_optimizer_state(connection, self.shard.parameters)
        with self._changed:
            buffer.unpack()
            self.shard.load_optimizer_state(tensors, scalars)
