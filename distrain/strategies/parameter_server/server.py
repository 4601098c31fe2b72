"""A server: holds a shard of the parameters, applies what workers push, and answers what they pull.

Li et al. 2014, "Scaling distributed machine learning with the parameter server" (OSDI), for servers, workers, push and
pull; Dean et al. 2012, "Large scale distributed deep networks" (NIPS), §4.1, for updates that wait for nobody; Ho et
al. 2013, "More effective distributed ML via a stale synchronous parallel parameter server" (NIPS), for the bound.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distrain.checkpoint import named_state
from distrain.communication.types import DTYPES, RankName
from distrain.compression.base import MessageCompressor
from distrain.compression.encoding.packing import pack, packed_size, unpack
from distrain.errors import PeerLost
from distrain.gradients.buckets import Gradients
from distrain.gradients.clip import clip_gradient_norm
from distrain.strategies.parameter_server.collectives import Meeting
from distrain.strategies.parameter_server.heartbeat import Pulse, Word, last_word_of
from distrain.strategies.parameter_server.protocol import Connection, Frame, Kind
from distrain.strategies.parameter_server.shards import Packed
from distrain.strategies.parameter_server.stop_decision import Bulletin

log = logging.getLogger(__name__)

#: Most numbers that an optimizer may keep for each number of a parameter.
_MOST_STATE = 8


@dataclass(frozen=True)
class Rules:
    """How a server treats its workers.

    Attributes:
        mode: ``sync``, ``async`` or ``ssp``.
        staleness: Steps that a worker may be ahead of the slowest when it starts one; ssp only.
        in_flight: Steps of a worker's own that are under way while it computes the next.
        clip: Largest norm of the whole model's gradient; sync only.
        on_nonfinite: What is done about a gradient that is not finite: ``stop`` refuses a worker's in async and ssp,
            ``skip`` and ``rewind`` leave out the update in sync.
        timeout_seconds: How long a worker may keep another one waiting.
        silence_seconds: How long a worker may give no sign of life.
        largest: Most bytes of a worker's contribution to a collective.
    """

    mode: str
    staleness: int | None
    in_flight: int
    clip: float | None
    on_nonfinite: str
    timeout_seconds: float
    silence_seconds: float
    largest: int

    @property
    def asks_for_norm(self) -> bool:
        """Whether an update waits for the norm of the whole model's gradient."""
        return self.mode == "sync" and (self.clip is not None or self.on_nonfinite != "stop")


@dataclass
class Shard:
    """What a server holds.

    Attributes:
        named: Parameters by name, in the model's order.
        gradients: Their gradients, in the buckets in which workers push them.
        optimizer: Of these parameters.
        compressor: Reads what workers' compressors wrote.
    """

    named: dict[str, nn.Parameter]
    gradients: Gradients
    optimizer: torch.optim.Optimizer
    compressor: MessageCompressor

    def room(self) -> Packed:
        """Room for a copy of the parameters."""
        return Packed(list(self.named.values()))

    def push_sizes(self, step: int) -> list[int]:
        """Bytes of each bucket's message in a step."""
        self.compressor.step = step
        return [packed_size(self.compressor.payload_layout(bucket)) for bucket in self.gradients.buckets]


@dataclass
class Worker:
    """What a server knows of a worker.

    Attributes:
        peer: Who it is.
        steps: Pushes that came from it.
        samples: Samples they were computed from.
        staleness: How many of its pushes were how many updates late.
        lead: Most steps that it was ahead of the slowest when it was given parameters for its next.
        pushed: Bytes of its gradients.
        pulled: Bytes of parameters it was given.
        lost: Why it is gone, if it is.
        left: Whether it was done.
    """

    peer: RankName
    steps: int = 0
    samples: int = 0
    staleness: Counter[int] = field(default_factory=Counter)
    lead: int = 0
    pushed: int = 0
    pulled: int = 0
    lost: str | None = None
    left: bool = False

    @property
    def lives(self) -> bool:
        """Whether others may wait for it."""
        return self.lost is None and not self.left

    def told(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {
            **self.end(),
            "samples": self.samples,
            "staleness": {str(late): count for late, count in sorted(self.staleness.items())},
            "lead": self.lead,
            "pushed": self.pushed,
            "pulled": self.pulled,
        }

    def end(self) -> dict[str, Any]:
        """Who it is, how far it came, and why it is gone, as plain data."""
        return {"rank": self.peer.rank, "host": self.peer.host, "steps": self.steps, "lost": self.lost}


@dataclass
class _Recent:
    """How many updates late the pushes were that came since somebody asked: how many, in sum, and at most."""

    pushes: int = 0
    late: int = 0
    latest: int = 0

    def add(self, late: int) -> None:
        self.pushes += 1
        self.late += late
        self.latest = max(self.latest, late)


@dataclass
class _Push:
    """One worker's gradients of one step: its part, ``share``, of a batch's mean gradient."""

    step: int
    rate: float
    share: float
    version: int
    count: int
    payloads: list[Tensor]


class _Stopped(Exception):
    """The server stops; the thread that hears it ends."""


class _Whole:
    """The shard's gradients with the norm of the whole model, which the workers have added up."""

    def __init__(self, gradients: Gradients, norm: float) -> None:
        self._gradients = gradients
        self._norm = norm

    def norm(self) -> Tensor:
        return torch.tensor(self._norm, dtype=torch.float64)

    def scale(self, factor: Tensor) -> None:
        self._gradients.scale(factor)


class Server:
    """Serves until all workers are done or dead.

    Every connection has a thread of its own, which waits in it, so that a slow worker holds up nobody. What they share
    is guarded by one lock, held while gradients are applied and parameters copied, never while bytes travel.

    Args:
        me: This rank.
        shard: What it holds.
        rules: How workers are treated.
        workers: All of them.
        connections: Of each worker, by rank and channel.
        told: Called with a worker that is lost, once for each.
        wish: What this server wishes all to do, as bits of :class:`distrain.runtime.consensus.Request`.

    Attributes:
        stopped: What the run was stopped by, if it was.
    """

    def __init__(
        self,
        me: RankName,
        shard: Shard,
        rules: Rules,
        workers: Sequence[RankName],
        connections: Mapping[tuple[int, str], Connection],
        told: Callable[[Worker], None],
        wish: Callable[[], int] = lambda: 0,
    ) -> None:
        self.shard = shard
        self.stopped: str | None = None
        self._wish = wish
        self._bulletin = Bulletin(rules.in_flight)
        self._me = me
        self._rules = rules
        self._told = told
        self._changed = threading.Condition(threading.RLock())
        self._stopped: BaseException | None = None
        self.workers = {peer.rank: Worker(peer) for peer in workers}
        self.version = 0
        self._meeting = Meeting([peer.rank for peer in workers], self._changed, rules.largest)
        self._gathered: dict[int, _Push] = {}
        self._sums = 0
        self._square = 0.0
        self._left_out = 0
        self._recent = _Recent()
        self._connections = connections
        self._pulses: dict[int, Pulse] = {}
        # Locked, since a worker may be gone already and its thread look for what is made here.
        with self._changed:
            for rank, worker in self.workers.items():
                self._pulses[rank] = Pulse(connections[rank, "pulse"], rules.silence_seconds, self._ender(worker))
                for channel, handler in (("work", self._work), ("talk", self._talk)):
                    arguments = (handler, worker, connections[rank, channel])
                    threading.Thread(target=self._guarded, args=arguments, daemon=True).start()

    # --- the life of the server --------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Waits until all workers are done.

        Raises:
            PeerLost: A worker is gone without which the run can't go on.
        """
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped is not None or not self._living())
                if self._stopped is not None:
                    raise self._stopped
        except BaseException as error:
            with self._changed:
                self._stop(error)
            reason, culprit = last_word_of(error)
            for rank, worker in self.workers.items():
                if worker.lives:
                    self._tell(rank, reason, culprit=culprit or self._me)
            raise
        finally:
            for connection in self._connections.values():
                connection.cut()

    def steps(self) -> int:
        """Steps that the fastest worker has finished."""
        return max(worker.steps for worker in self.workers.values())

    def _living(self) -> list[Worker]:
        return [worker for worker in self.workers.values() if worker.lives]

    def _stop(self, error: BaseException) -> None:
        self._stopped = self._stopped or error
        self._changed.notify_all()

    def _ender(self, worker: Worker) -> Callable[[Word], None]:
        def ended(word: Word) -> None:
            if word.left:
                with self._changed:
                    worker.left = True
                    self.stopped = self.stopped or word.stopped
                    self._changed.notify_all()
            else:
                self._lose(worker, word)

        return ended

    def _lose(self, worker: Worker, word: Word) -> None:
        with self._changed:
            if not worker.lives or self._stopped is not None:
                return
            behind = word.culprit or worker.peer
            worker.lost = word.reason if word.culprit is None else f"it lost {word.culprit}: {word.reason}"
            if self._rules.mode == "sync" or worker.peer.rank == 0 or word.fatal:
                self._stop(PeerLost(behind.rank, behind.host, word.reason))
            else:
                # Whom it lost the others may still have; if not, they will say so.
                self._meeting.lose(worker.peer.rank)
                self._told(worker)
            self._changed.notify_all()
        self._tell(worker.peer.rank, word.reason, expelled=True)
        for channel in ("work", "talk", "pulse"):
            self._connections[worker.peer.rank, channel].cut()

    def _tell(self, rank: int, reason: str, *, culprit: RankName | None = None, expelled: bool = False) -> None:
        try:
            self._pulses[rank].say(reason, culprit=culprit, expelled=expelled)
        except OSError:
            log.info("worker %s did not hear why its connection ends", self.workers[rank].peer)

    def _guarded(self, handler: Callable[[Worker, Connection], None], worker: Worker, connection: Connection) -> None:
        try:
            handler(worker, connection)
        except _Stopped:
            return
        except OSError:
            # Why it is gone the pulse knows, or will in a moment.
            self._pulses[worker.peer.rank].last_word(1.0)
        except BaseException as error:
            with self._changed:
                self._stop(error)
        finally:
            connection.close()

    def _wait(self, done: Callable[[], bool], awaited: Callable[[], Iterable[int]]) -> None:
        """Waits, with the lock held, until something is true; the run ends if it takes too long."""
        limit = self._rules.timeout_seconds
        if not self._changed.wait_for(lambda: done() or self._stopped is not None, limit):
            late = ", ".join(str(self.workers[rank].peer) for rank in sorted(awaited()))
            self._stop(RuntimeError(f"waited longer than {limit:g} s for {late}"))
        if self._stopped is not None:
            raise _Stopped

    # --- pushes and pulls --------------------------------------------------------------------------------------------

    def _work(self, worker: Worker, connection: Connection) -> None:
        room = self.shard.room()
        while True:
            frame = connection.receive(Kind.PUSH, Kind.PULL)
            connection.read(frame, 0)
            waited = 0.0
            if frame.kind is Kind.PUSH:
                push = self._receive(frame, connection)
                worker.pushed += sum(payload.numel() for payload in push.payloads)
                if self._rules.mode == "sync":
                    self._together(worker, push, connection)
                else:
                    waited = self._at_once(worker, push)
            with self._changed:
                if frame.kind is Kind.PUSH:
                    self._bulletin.hear(frame.whole("wish"), worker.steps, [each.steps for each in self._living()])
                lost = [each.end() for each in self.workers.values() if each.lost]
                meta = {"version": self.version, "waited": waited, "lost": lost, "wish": self._wish()}
                meta |= {"decided": self._bulletin.step, "wishes": self._bulletin.wishes}
                packed = room.pack()
            connection.send(Kind.PARAMETERS, meta, packed)
            worker.pulled += packed.numel()

    def _receive(self, frame: Frame, connection: Connection) -> _Push:
        step, payloads = frame.whole("step"), []
        with self._changed:
            sizes = self.shard.push_sizes(step)
        for index, size in enumerate(sizes):
            part = connection.receive(Kind.BUCKET)
            if part.whole("index") != index:
                raise part.refuse(f"is not number {index} of {len(sizes)}")
            payloads.append(connection.read(part, size))
        share, version, count = frame.real("share"), frame.whole("version"), frame.whole("count")
        if count and not 0 < share <= 1:
            raise frame.refuse(f"share is {share}, no part of a batch")
        return _Push(step, frame.real("rate"), share, version, count, payloads)

    def _at_once(self, worker: Worker, push: _Push) -> float:
        """Applies a push that waits for nobody, and keeps the worker waiting if it is too far ahead.

        Returns:
            How many seconds it was kept waiting.
        """
        with self._changed:
            if not worker.lives:
                # Its last push came, but it was counted out meanwhile.
                raise ConnectionError(f"worker {worker.peer} is gone")
            late = self.version - push.version
            worker.staleness[late] += 1
            self._recent.add(late)
            # A share without samples is no gradient; an optimizer with momentum would move all the same.
            if push.count:
                self._sum([push])
                if self._rules.on_nonfinite == "stop" and not bool(self.shard.gradients.norm().isfinite()):
                    reason = f"NonFinite: its gradient in step {push.step} is not finite"
                    raise PeerLost(worker.peer.rank, worker.peer.host, reason)
                # The mean of the worker's samples, with its part of the rate.
                self.shard.gradients.scale(torch.tensor(1 / push.share))
                self._update(push.rate * push.share)
            worker.steps += 1
            worker.samples += push.count
            self._changed.notify_all()
            came = time.perf_counter()
            if self._rules.staleness is not None:
                # The parameters that it gets now are for the step after those under way.
                slowest = worker.steps + self._rules.in_flight - self._rules.staleness
                self._wait(lambda: not self._behind(slowest), lambda: self._behind(slowest))
            least = min(each.steps for each in [*self._living(), worker])
            worker.lead = max(worker.lead, worker.steps + self._rules.in_flight - least)
            return time.perf_counter() - came

    def _behind(self, steps: int) -> set[int]:
        return {worker.peer.rank for worker in self._living() if worker.steps < steps}

    def _together(self, worker: Worker, push: _Push, connection: Connection) -> None:
        """Waits for all workers' pushes of a step and applies their sum."""
        rank = worker.peer.rank
        with self._changed:
            for other in self._gathered.values():
                if (other.step, other.rate) != (push.step, push.rate):
                    raise RuntimeError(f"{worker.peer} is at step {push.step}, another worker at {other.step}")
            self._gathered[rank] = push
            worker.steps += 1
            worker.samples += push.count
            worker.staleness[self.version - push.version] += 1
            next_version = self.version + 1
            if len(self._gathered) == len(self.workers):
                # In order of rank, so that the sum has the same bits in every run.
                self._sum([self._gathered[each] for each in sorted(self._gathered)])
                self._gathered.clear()
                self._sums += 1
                if not self._rules.asks_for_norm:
                    self._update(push.rate)
                else:
                    self._square = float(self.shard.gradients.norm().double().square())
                self._changed.notify_all()
            self._wait(lambda: self._sums >= next_version, lambda: set(self.workers) - set(self._gathered))
            square = self._square
        if self._rules.asks_for_norm:
            # Only the workers know the norm over all servers.
            connection.send(Kind.NORM, {"square": square})
            norm = connection.receive(Kind.NORM)
            connection.read(norm, 0)
            with self._changed:
                # All workers answer alike; the first one's answer does it.
                if self.version < next_version:
                    if self._rules.on_nonfinite != "stop" and not math.isfinite(norm.real("norm")):
                        self._leave_out()
                    else:
                        clip_gradient_norm(_Whole(self.shard.gradients, norm.real("norm")), self._rules.clip)
                        self._update(push.rate)

    def _sum(self, pushes: Sequence[_Push]) -> None:
        gradients, compressor = self.shard.gradients, self.shard.compressor
        gradients.zero()
        for push in pushes:
            compressor.step = push.step
            for bucket, payload in zip(gradients.buckets, push.payloads, strict=True):
                compressor.decode(payload.to(bucket.flat.device), bucket)

    def _update(self, rate: float) -> None:
        for group in self.shard.optimizer.param_groups:
            group["lr"] = rate
        self.shard.optimizer.step()
        self.version += 1
        self._changed.notify_all()

    def _leave_out(self) -> None:
        # Counted like an update, so that everybody's next push is of the next one.
        self.version += 1
        self._left_out += 1
        self._changed.notify_all()

    # --- everything else ---------------------------------------------------------------------------------------------

    def _talk(self, worker: Worker, connection: Connection) -> None:
        rank = worker.peer.rank
        while True:
            frame = connection.receive(
                Kind.COLLECTIVE, Kind.SEND, Kind.RECEIVE, Kind.NORM, Kind.TELL, Kind.STATE, Kind.LOAD
            )
            if frame.kind is Kind.COLLECTIVE:
                answer = self._meeting.enter(rank, frame, self._meeting.read(connection, frame), self._wait)
                connection.send(Kind.RESULT, answer.meta, answer.body)
            elif frame.kind is Kind.SEND:
                self._meeting.post(rank, frame, self._meeting.read(connection, frame))
                connection.send(Kind.DONE)
            elif frame.kind is Kind.LOAD:
                self._load(frame, connection)
                connection.send(Kind.DONE)
            else:
                connection.read(frame, 0)
                if frame.kind is Kind.RECEIVE:
                    connection.send(Kind.RESULT, None, self._meeting.fetch(rank, frame, self._wait))
                elif frame.kind is Kind.STATE:
                    meta, body = self._state()
                    connection.send(Kind.STATE, meta, body)
                else:
                    connection.send(frame.kind, self._norm() if frame.kind is Kind.NORM else self._tell_about(frame))

    def _norm(self) -> dict[str, Any]:
        with self._changed:
            return {"square": float(self.shard.gradients.norm().double().square())}

    def _tell_about(self, frame: Frame) -> dict[str, Any]:
        """Who did what; with ``recent``, only the staleness since that was last asked."""
        with self._changed:
            if frame.meta.get("recent"):
                recent, self._recent = self._recent, _Recent()
                return {"pushes": recent.pushes, "late": recent.late, "latest": recent.latest}
            return {
                "workers": [worker.told() for worker in self.workers.values()],
                "updates": self.version - self._left_out,
                "tensors": len(self.shard.named),
                "bytes": sum(each.numel() * each.element_size() for each in self.shard.named.values()),
            }

    def _state(self) -> tuple[dict[str, Any], Tensor]:
        """The optimizer's state: names, dtypes and shapes of its tensors, and its scalars; and the tensors."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.shard.named.items()}
        with self._changed:
            tensors, scalars = named_state.optimizer_state(self.shard.optimizer, names)
            return {"tensors": described(tensors), "scalars": scalars}, packed(tensors)

    def _load(self, frame: Frame, connection: Connection) -> None:
        """Takes parameters and the optimizer's state."""
        room = self.shard.room()
        connection.read_into(frame, room.bytes)
        tensors, scalars = receive_state(connection, self.shard.named)
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.shard.named.items()}
        with self._changed:
            room.unpack()
            self.shard.optimizer.state.clear()
            named_state.load_optimizer(self.shard.optimizer, names, tensors, scalars)


# --- optimizer state on the wire -------------------------------------------------------------------------------------


def described(tensors: Mapping[str, Tensor]) -> list[list[Any]]:
    """Name, dtype and shape of each tensor."""
    return [[name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in tensors.items()]


def packed(tensors: Mapping[str, Tensor]) -> Tensor:
    """All tensors as one run of bytes on the CPU, each in the order of its indices."""
    parts = [tensor.detach().cpu().contiguous().flatten() for tensor in tensors.values()]
    return pack(parts) if parts else torch.empty(0, dtype=torch.uint8)


def receive_state(
    connection: Connection, named: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Receives what an optimizer keeps for some parameters.

    Args:
        connection: Where a ``STATE`` frame comes next.
        named: The parameters; each tensor is a scalar or has its parameter's shape.

    Returns:
        Tensors as ``<parameter name>/<what>`` on the CPU, and non-tensors in the same way.

    Raises:
        ProtocolError: It is about other parameters, has other shapes or sizes, or is far too large.
    """
    frame = connection.receive(Kind.STATE)
    entries, scalars = frame.meta.get("tensors"), frame.meta.get("scalars")
    if not isinstance(entries, list) or not isinstance(scalars, dict):
        raise frame.refuse("names no tensors")
    form, shapes = [], {}
    for entry in entries:
        named_well = isinstance(entry, list) and len(entry) == 3 and all(isinstance(part, str) for part in entry[:2])
        if not named_well or entry[1] not in DTYPES:
            raise frame.refuse(f"{entry!r} is no name, dtype and shape")
        key, dtype, shape = entry[0], DTYPES[entry[1]], entry[2]
        parameter = named.get(key.rpartition("/")[0])
        if parameter is None or shape not in ([], list(parameter.shape)):
            raise frame.refuse(f"{key} {shape} is of none of the parameters here")
        shapes[key] = shape
        form.append((dtype, torch.Size(shape).numel()))
    size = packed_size(form)
    if size > _MOST_STATE * sum(8 * (parameter.numel() + 1) for parameter in named.values()):
        raise frame.refuse(f"{size} bytes are far more than an optimizer keeps")
    parts = unpack(connection.read(frame, size), form) if form else []
    return {key: part.view(shapes[key]) for key, part in zip(shapes, parts, strict=True)}, scalars
