"""Collectives among the workers that are alive, carried out by one server.

A process group would serve as long as all workers live: when one dies, every later collective of the group fails. Here
each worker sends its contribution to the server, which answers when it has those of all workers that are alive. It
doesn't wait for a worker that dies meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from distrain.communication.collectives import Communicator
from distrain.communication.types import DONE, DTYPES, Pending, Reduction
from distrain.strategies.parameter_server.protocol import Connection, Frame, FrameKind

_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda stacked: stacked.sum(0).to(stacked.dtype),
    "max": lambda stacked: stacked.amax(0),
    "min": lambda stacked: stacked.amin(0),
}
_OPERATIONS = (*_REDUCTIONS, "broadcast", "gather", "gather_json", "accumulate")
#: Sends a frame (kind, JSON, body) and returns the answer, which has the given kind and size in bytes, and its body.
SendRequest = Callable[
    [FrameKind, Mapping[str, Any], Tensor | None, FrameKind, Callable[[Frame], int]], tuple[Frame, Tensor]
]
#: Waits, with the lock held, until a condition is true; the second function names the ranks that are waited for.
WaitUntil = Callable[[Callable[[], bool], Callable[[], set[int]]], None]


@dataclass
class _Contribution:
    meta: dict[str, Any]
    body: Tensor


@dataclass
class CollectiveResult:
    """The result of a collective.

    Attributes:
        meta: ``members``, the ranks that were alive; for ``gather_json`` also ``objects``, what they contributed.
        body: uint8 ``[bytes]``.
    """

    meta: dict[str, Any]
    body: Tensor


@dataclass
class _Collective:
    """One collective: the contributions by rank and, when it is complete, the results by rank."""

    contributions: dict[int, _Contribution] = field(default_factory=dict)
    results: dict[int, CollectiveResult] | None = None


class CollectiveServer:
    """The server's side.

    Args:
        workers: Ranks of all workers.
        changed: Guards this object and the rest of the server's state; it is notified when a thread may continue.
        max_bytes: Maximum size of a worker's contribution, in bytes.
    """

    def __init__(self, workers: list[int], changed: threading.Condition, max_bytes: int) -> None:
        self._changed = changed
        self._living = list(workers)
        self._max_bytes = max_bytes
        self._collectives_joined = dict.fromkeys(workers, 0)
        self._collectives: dict[int, _Collective] = {}
        # By count and rank: what all workers have added since that rank last asked.
        self._unread: dict[tuple[str, int], Tensor] = {}
        self._messages: dict[tuple[int, int, int], Tensor] = {}

    def remove_worker(self, rank: int) -> None:
        """Stops waiting for a worker. Its earlier contributions to reductions count; gathers leave them out."""
        if rank in self._living:
            self._living.remove(rank)
        for collective in list(self._collectives.values()):
            self._complete_if_all_joined(collective)
        self._changed.notify_all()

    # --- requests of one worker --------------------------------------------------------------------------------------

    def read_body(self, connection: Connection, frame: Frame) -> Tensor:
        """Reads a worker's contribution, uint8 ``[bytes]``.

        Raises:
            ProtocolError: It is larger than allowed.
        """
        if frame.size > self._max_bytes:
            raise frame.protocol_error(f"{frame.size} bytes, {self._max_bytes} allowed")
        return connection.read_body(frame, frame.size)

    def join(self, rank: int, frame: Frame, body: Tensor, wait_until: WaitUntil) -> CollectiveResult:
        """Adds a worker's contribution to a collective and waits for those of the others.

        Args:
            rank: The worker.
            frame: ``operation``, ``dtype``, and what the operation needs: ``source``, ``name``, ``wait``, ``object``.
            body: uint8 ``[bytes]``.
            wait_until: Waits, with ``changed`` held, until a condition is true.

        Raises:
            ProtocolError: The contribution doesn't match those of the other workers.
            ConnectionError: The worker itself was removed, so its connection is to be ended.
        """
        operation = frame.string("operation")
        if operation not in _OPERATIONS:
            raise frame.protocol_error(f"no operation {operation!r}")
        dtype = frame.string("dtype")
        if dtype not in DTYPES or body.numel() % DTYPES[dtype].itemsize:
            raise frame.protocol_error(f"{body.numel()} bytes of {dtype!r}")
        if operation == "broadcast":
            frame.integer("source")
        elif operation == "accumulate":
            frame.string("name")
        with self._changed:
            self._check_alive(rank)
            if operation == "accumulate" and not frame.meta.get("wait"):
                self._add(frame.string("name"), body.view(DTYPES[dtype]))
                return self._read_total(frame.string("name"), rank)
            number = self._collectives_joined[rank]
            self._collectives_joined[rank] += 1
            collective = self._collectives.setdefault(number, _Collective())
            self._check_match(frame, body, collective)
            collective.contributions[rank] = _Contribution(frame.meta, body)
            self._complete_if_all_joined(collective)
            wait_until(
                lambda: collective.results is not None, lambda: set(self._living) - set(collective.contributions)
            )
            self._check_alive(rank)
            assert collective.results is not None
            return collective.results[rank]

    def store_message(self, rank: int, frame: Frame, body: Tensor) -> None:
        """Stores a message from worker ``rank`` until the worker that it is addressed to takes it."""
        with self._changed:
            self._messages[rank, frame.integer("to"), frame.integer("tag")] = body
            self._changed.notify_all()

    def take_message(self, rank: int, frame: Frame, wait_until: WaitUntil) -> Tensor:
        """Waits for a message that is addressed to worker ``rank`` and returns it.

        Raises:
            ProtocolError: The sender is gone and sent nothing.
        """
        source = frame.integer("source")
        key = (source, rank, frame.integer("tag"))
        with self._changed:
            wait_until(lambda: key in self._messages or source not in self._living, lambda: {source})
            if key not in self._messages:
                raise frame.protocol_error(f"rank {source} is gone and has sent nothing")
            return self._messages.pop(key)

    # --- results -----------------------------------------------------------------------------------------------------

    def _check_alive(self, rank: int) -> None:
        if rank not in self._living:
            raise ConnectionError(f"worker rank {rank} is gone")

    def _check_match(self, frame: Frame, body: Tensor, collective: _Collective) -> None:
        for other in collective.contributions.values():
            for key in ("operation", "dtype", "source", "name"):
                own, others = frame.meta.get(key), other.meta.get(key)
                if own != others:
                    raise frame.protocol_error(f"{key} is {own!r}, another worker's {others!r}")
            if other.body.numel() != body.numel():
                raise frame.protocol_error(f"{body.numel()} bytes, another worker's are {other.body.numel()}")

    def _complete_if_all_joined(self, collective: _Collective) -> None:
        if collective.results is not None or not set(self._living) <= set(collective.contributions):
            return
        collective.results = self._compute_results(collective.contributions)
        self._collectives = {number: other for number, other in self._collectives.items() if other is not collective}
        self._changed.notify_all()

    def _compute_results(self, contributions: Mapping[int, _Contribution]) -> dict[int, CollectiveResult]:
        in_rank_order = [contributions[rank] for rank in sorted(contributions)]
        meta = in_rank_order[0].meta
        operation, dtype = meta["operation"], DTYPES[meta["dtype"]]
        result = CollectiveResult({"members": list(self._living)}, torch.empty(0, dtype=torch.uint8))
        if operation == "broadcast":
            # If the source died, the body stays empty, and the receivers report that its size is wrong.
            result.body = contributions[meta["source"]].body if meta["source"] in contributions else result.body
        elif operation == "gather":
            result.body = torch.cat([result.body, *(contributions[rank].body for rank in self._living)])
        elif operation == "gather_json":
            result.meta["objects"] = [contributions[rank].meta.get("object") for rank in self._living]
        else:
            # Includes contributions of workers that died meanwhile: they have seen the samples that they counted.
            stacked = torch.stack([contribution.body.view(dtype) for contribution in in_rank_order])
            reduced = _REDUCTIONS["sum" if operation == "accumulate" else operation](stacked)
            if operation == "accumulate":
                self._add(meta["name"], reduced)
                return {rank: self._read_total(meta["name"], rank) for rank in self._living}
            result.body = reduced.view(torch.uint8)
        return dict.fromkeys(self._living, result)

    def _add(self, name: str, amount: Tensor) -> None:
        for rank in self._living:
            unread = self._unread.get((name, rank))
            self._unread[name, rank] = amount if unread is None else unread + amount

    def _read_total(self, name: str, rank: int) -> CollectiveResult:
        return CollectiveResult({"members": list(self._living)}, self._unread.pop((name, rank)).view(torch.uint8))


class WorkerCommunicator(Communicator):
    """The workers' side: the collectives that the trainer needs, over the workers that are alive.

    ``rank`` and ``size`` refer to the workers that were alive at the last collective, the same on all of them.

    Args:
        send_request: Sends a frame to the server that carries out the collectives, and returns its answer.
        rank: This worker's rank in the world.
        workers: Ranks in the world of all workers.

    Attributes:
        members: Ranks in the world of the workers that were alive at the last collective.
    """

    def __init__(self, send_request: SendRequest, rank: int, workers: list[int]) -> None:
        super().__init__()
        self._send_request = send_request
        self._world_rank = rank
        self._set_members(workers)

    def _set_members(self, members: list[int]) -> None:
        self.members = members
        self.rank, self.size = members.index(self._world_rank), len(members)

    def _run_collective(
        self, operation: str, tensor: Tensor, copies: int | None = 1, **fields: Any
    ) -> tuple[Frame, Tensor]:
        """Takes part in a collective and returns the server's answer.

        Args:
            operation: The collective.
            tensor: This worker's contribution.
            copies: Size of the result, in sizes of ``tensor``; ``None``: one for each member.
            fields: Further fields of the request.
        """
        body = _to_bytes(tensor)
        dtype = str(tensor.dtype).removeprefix("torch.")

        def expected_size(frame: Frame) -> int:
            return body.numel() * (len(frame.meta["members"]) if copies is None else copies)

        request = {"operation": operation, "dtype": dtype, **fields}
        frame, result = self._send_request(FrameKind.COLLECTIVE, request, body, FrameKind.RESULT, expected_size)
        self._set_members([int(rank) for rank in frame.meta["members"]])
        return frame, result

    @override
    def start_all_reduce(self, tensor: Tensor, reduction: Reduction = "sum") -> Pending:
        tensor.copy_(_from_bytes(self._run_collective(reduction, tensor)[1], tensor))
        return DONE

    @override
    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        _, body = self._run_collective("broadcast", tensor, source=self.members[source])
        tensor.copy_(_from_bytes(body, tensor))
        return tensor

    @override
    def start_all_gather(self, tensor: Tensor) -> tuple[list[Tensor], Pending]:
        _, body = self._run_collective("gather", tensor, copies=None)
        parts = body.view(self.size, tensor.numel() * tensor.element_size())
        return [_from_bytes(part, tensor) for part in parts], DONE

    @override
    def start_send(self, tensor: Tensor, to: int, tag: int) -> Pending:
        request = {"to": self.members[to], "tag": tag}
        self._send_request(FrameKind.SEND, request, _to_bytes(tensor), FrameKind.DONE, lambda _: 0)
        return DONE

    @override
    def start_receive(self, tensor: Tensor, source: int, tag: int) -> Pending:
        request = {"source": self.members[source], "tag": tag}
        size = tensor.numel() * tensor.element_size()
        _, body = self._send_request(FrameKind.RECEIVE, request, None, FrameKind.RESULT, lambda _: size)
        tensor.copy_(_from_bytes(body, tensor))
        return DONE

    @override
    def all_gather_json(self, mine: Mapping[str, Any], device: torch.device) -> list[dict[str, Any]]:
        frame, _ = self._run_collective("gather_json", torch.empty(0), object=dict(mine))
        return list(frame.meta["objects"])

    @override
    def barrier(self) -> None:
        self._run_collective("sum", torch.empty(0))

    def accumulate(self, name: str, amount: Tensor, *, wait: bool) -> Tensor:
        """Adds to a count that all workers share.

        Args:
            name: Name of the count.
            amount: What this worker adds, 1-D.
            wait: Wait until all workers that are alive have added theirs.

        Returns:
            What all workers together have added since this one last called.
        """
        return _from_bytes(self._run_collective("accumulate", amount, name=name, wait=wait)[1], amount)


def _to_bytes(tensor: Tensor) -> Tensor:
    # Flattened first: a scalar can't be viewed as another dtype.
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def _from_bytes(body: Tensor, tensor: Tensor) -> Tensor:
    """Interprets bytes with the shape and dtype of ``tensor``, on its device."""
    return body.view(tensor.dtype).view(tensor.shape).to(tensor.device)


@torch.no_grad()
def average_in_place(tensors: Sequence[Tensor], workers: Communicator) -> None:
    """Replaces tensors by their means over the workers that live; all of them call it together."""
    if tensors and workers.size > 1:
        # With a count, since a worker may go just now; in float64, so that what is equal stays what it is.
        parts = [tensor.double().flatten() for tensor in tensors]
        total = workers.all_reduce(torch.cat([*parts, parts[0].new_ones(1)]))
        means = (total[:-1] / total[-1]).split([tensor.numel() for tensor in tensors])
        for tensor, mean in zip(tensors, means, strict=True):
            tensor.copy_(mean.view_as(tensor))
