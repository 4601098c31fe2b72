"""Collectives among the workers that are alive, held by one server.

A process group would do until a worker dies: then every collective of the whole group fails. Here the server takes what
the workers bring and answers when all that are alive have come; who dies meanwhile is not waited for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distrain.communication.collectives import Communicator
from distrain.communication.types import DONE, DTYPES, Pending, Reduction
from distrain.strategies.parameter_server.protocol import Connection, Frame, Kind

_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda all_: all_.sum(0).to(all_.dtype),
    "max": lambda all_: all_.amax(0),
    "min": lambda all_: all_.amin(0),
}
#: Sends a frame (kind, JSON, bytes) and returns the answer, of the given kind and number of bytes.
Ask = Callable[[Kind, Mapping[str, Any], Tensor | None, Kind, Callable[[Frame], int]], tuple[Frame, Tensor]]
_OPERATIONS = (*_REDUCTIONS, "broadcast", "gather", "share", "tally")
#: Waits, with the lock held, until a condition is true; the other function says which ranks it waits for.
Wait = Callable[[Callable[[], bool], Callable[[], set[int]]], None]


@dataclass
class _Contribution:
    meta: dict[str, Any]
    body: Tensor


@dataclass
class Answer:
    """What came of a collective.

    Attributes:
        meta: ``members``, the ranks that were alive, and what was shared.
        body: uint8.
    """

    meta: dict[str, Any]
    body: Tensor


@dataclass
class _Round:
    """One collective: what was brought, and once all are there, each rank's answer."""

    brought: dict[int, _Contribution] = field(default_factory=dict)
    answers: dict[int, Answer] | None = None


class Meeting:
    """The server's side.

    Args:
        workers: Ranks.
        changed: Guards this and whatever else the server holds; notified when somebody may go on.
        largest: Most bytes that a worker may bring.
    """

    def __init__(self, workers: list[int], changed: threading.Condition, largest: int) -> None:
        self._changed = changed
        self._living = list(workers)
        self._largest = largest
        self._entered = dict.fromkeys(workers, 0)
        self._rounds: dict[int, _Round] = {}
        # What each worker has not seen yet of what all counted.
        self._unseen: dict[tuple[str, int], Tensor] = {}
        self._mail: dict[tuple[int, int, int], Tensor] = {}

    def lose(self, rank: int) -> None:
        """Nobody waits for this worker any more; what it brought before counts, but not for what it saw."""
        if rank in self._living:
            self._living.remove(rank)
        for round_ in list(self._rounds.values()):
            self._complete_if_all_came(round_)
        self._changed.notify_all()

    # --- one worker comes --------------------------------------------------------------------------------------------

    def read(self, connection: Connection, frame: Frame) -> Tensor:
        """What a worker brings: its bytes, if they are no more than allowed."""
        if frame.size > self._largest:
            raise frame.refuse(f"{frame.size} bytes, {self._largest} are allowed")
        return connection.read(frame, frame.size)

    def enter(self, rank: int, frame: Frame, body: Tensor, wait: Wait) -> Answer:
        """Brings a worker's contribution and waits for the others'.

        Args:
            rank: The worker.
            frame: ``operation``, ``dtype``, and what else it needs: ``source``, ``name``, ``wait``, ``shared``.
            body: uint8.
            wait: Waits, with ``changed`` held, until a condition is true.

        Raises:
            ProtocolError: It doesn't fit what others brought.
            ConnectionError: The worker is gone, and nobody is there to be answered.
        """
        operation = frame.text("operation")
        if operation not in _OPERATIONS:
            raise frame.refuse(f"no operation {operation!r}")
        dtype = frame.text("dtype")
        if dtype not in DTYPES or body.numel() % DTYPES[dtype].itemsize:
            raise frame.refuse(f"{body.numel()} bytes of {dtype!r}")
        if operation == "broadcast":
            frame.whole("source")
        elif operation == "tally":
            frame.text("name")
        with self._changed:
            self._check_alive(rank)
            if operation == "tally" and not frame.meta.get("wait"):
                self._count(frame.text("name"), body.view(DTYPES[dtype]))
                return self._counted(frame.text("name"), rank)
            number = self._entered[rank]
            self._entered[rank] += 1
            round_ = self._rounds.setdefault(number, _Round())
            self._check(frame, body, round_)
            round_.brought[rank] = _Contribution(frame.meta, body)
            self._complete_if_all_came(round_)
            wait(lambda: round_.answers is not None, lambda: set(self._living) - set(round_.brought))
            self._check_alive(rank)
            assert round_.answers is not None
            return round_.answers[rank]

    def post(self, rank: int, frame: Frame, body: Tensor) -> None:
        """Keeps a message for another worker."""
        with self._changed:
            self._mail[rank, frame.whole("to"), frame.whole("tag")] = body
            self._changed.notify_all()

    def fetch(self, rank: int, frame: Frame, wait: Wait) -> Tensor:
        """Waits for a message from another worker.

        Raises:
            ProtocolError: The other one is gone and sent nothing.
        """
        source = frame.whole("source")
        key = (source, rank, frame.whole("tag"))
        with self._changed:
            wait(lambda: key in self._mail or source not in self._living, lambda: {source})
            if key not in self._mail:
                raise frame.refuse(f"rank {source} is gone and has sent nothing")
            return self._mail.pop(key)

    # --- what comes of it --------------------------------------------------------------------------------------------

    def _check_alive(self, rank: int) -> None:
        if rank not in self._living:
            raise ConnectionError(f"worker rank {rank} is gone")

    def _check(self, frame: Frame, body: Tensor, round_: _Round) -> None:
        for other in round_.brought.values():
            for key in ("operation", "dtype", "source", "name"):
                if other.meta.get(key) != frame.meta.get(key):
                    raise frame.refuse(f"{key} is {frame.meta.get(key)!r}, another worker's {other.meta.get(key)!r}")
            if other.body.numel() != body.numel():
                raise frame.refuse(f"{body.numel()} bytes, another worker's are {other.body.numel()}")

    def _complete_if_all_came(self, round_: _Round) -> None:
        if round_.answers is not None or not set(self._living) <= set(round_.brought):
            return
        round_.answers = self._answers(round_.brought)
        self._rounds = {number: other for number, other in self._rounds.items() if other is not round_}
        self._changed.notify_all()

    def _answers(self, brought: Mapping[int, _Contribution]) -> dict[int, Answer]:
        everybody = [brought[rank] for rank in sorted(brought)]
        meta = everybody[0].meta
        operation, dtype = meta["operation"], DTYPES[meta["dtype"]]
        answer = Answer({"members": list(self._living)}, torch.empty(0, dtype=torch.uint8))
        if operation == "broadcast":
            # The worker that has nothing to copy from is told by the number of bytes.
            answer.body = brought[meta["source"]].body if meta["source"] in brought else answer.body
        elif operation == "gather":
            answer.body = torch.cat([answer.body, *(brought[rank].body for rank in self._living)])
        elif operation == "share":
            answer.meta["shared"] = [brought[rank].meta.get("shared") for rank in self._living]
        else:
            # Those who are gone have seen what they counted, so it counts.
            stacked = torch.stack([each.body.view(dtype) for each in everybody])
            reduced = _REDUCTIONS["sum" if operation == "tally" else operation](stacked)
            if operation == "tally":
                self._count(meta["name"], reduced)
                return {rank: self._counted(meta["name"], rank) for rank in self._living}
            answer.body = reduced.view(torch.uint8)
        return dict.fromkeys(self._living, answer)

    def _count(self, name: str, counted: Tensor) -> None:
        for rank in self._living:
            unseen = self._unseen.get((name, rank))
            self._unseen[name, rank] = counted if unseen is None else unseen + counted

    def _counted(self, name: str, rank: int) -> Answer:
        return Answer({"members": list(self._living)}, self._unseen.pop((name, rank)).view(torch.uint8))


class Everyone(Communicator):
    """The workers' side: the collectives that the trainer needs, over the workers that are alive.

    ``rank`` and ``size`` are those among the workers that were alive at the last collective, the same for all.

    Args:
        ask: Sends a frame to the server that holds the meeting, and gives its answer with its bytes.
        rank: This worker's rank in the world.
        workers: All workers' ranks.

    Attributes:
        members: Ranks in the world of the workers that were alive at the last collective.
    """

    def __init__(self, ask: Ask, rank: int, workers: list[int]) -> None:
        super().__init__()
        self._ask = ask
        self._own_rank = rank
        self._settle(workers)

    def _settle(self, members: list[int]) -> None:
        self.members = members
        self.rank, self.size = members.index(self._own_rank), len(members)

    def _meet(self, operation: str, tensor: Tensor, times: int | None = 1, **meta: Any) -> tuple[Frame, Tensor]:
        """The server's answer and its bytes, ``times`` as many as ``tensor`` has; ``None``: for each member."""
        body = _bytes(tensor)
        dtype = str(tensor.dtype).removeprefix("torch.")

        def expected(frame: Frame) -> int:
            return body.numel() * (len(frame.meta["members"]) if times is None else times)

        asked = {"operation": operation, "dtype": dtype, **meta}
        frame, answer = self._ask(Kind.COLLECTIVE, asked, body, Kind.RESULT, expected)
        self._settle([int(rank) for rank in frame.meta["members"]])
        return frame, answer

    def start_all_reduce(self, tensor: Tensor, reduction: Reduction = "sum") -> Pending:
        """Reduces at once; see the base class."""
        tensor.copy_(_like(self._meet(reduction, tensor)[1], tensor))
        return DONE

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """See the base class."""
        tensor.copy_(_like(self._meet("broadcast", tensor, source=self.members[source])[1], tensor))
        return tensor

    def start_all_gather(self, tensor: Tensor) -> tuple[list[Tensor], Pending]:
        """Gathers at once; see the base class."""
        gathered = self._meet("gather", tensor, times=None)[1].view(self.size, tensor.numel() * tensor.element_size())
        return [_like(part, tensor) for part in gathered], DONE

    def start_send(self, tensor: Tensor, to: int, tag: int) -> Pending:
        """Leaves the message with the server; see the base class."""
        self._ask(Kind.SEND, {"to": self.members[to], "tag": tag}, _bytes(tensor), Kind.DONE, lambda _: 0)
        return DONE

    def start_receive(self, tensor: Tensor, source: int, tag: int) -> Pending:
        """Waits for the message at once; see the base class."""
        asked = {"source": self.members[source], "tag": tag}
        size = tensor.numel() * tensor.element_size()
        tensor.copy_(_like(self._ask(Kind.RECEIVE, asked, None, Kind.RESULT, lambda _: size)[1], tensor))
        return DONE

    def all_gather_json(self, mine: Mapping[str, Any], device: torch.device) -> list[dict[str, Any]]:
        """See the base class."""
        return list(self._meet("share", torch.empty(0), shared=dict(mine))[0].meta["shared"])

    def barrier(self) -> None:
        """Waits until all workers that are alive are here."""
        self._meet("sum", torch.empty(0))

    def tally(self, name: str, counted: Tensor, *, wait: bool) -> Tensor:
        """Adds to a count that all workers share.

        Args:
            name: Which count.
            counted: What this worker adds, 1-D.
            wait: Until all workers that are alive have added theirs.

        Returns:
            What all workers together have added since this one last asked.
        """
        return _like(self._meet("tally", counted, name=name, wait=wait)[1], counted)


def _bytes(tensor: Tensor) -> Tensor:
    # Flattened first: a scalar can't be viewed as another type.
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def _like(body: Tensor, tensor: Tensor) -> Tensor:
    """Bytes as a tensor's shape, type and device."""
    return body.view(tensor.dtype).view(tensor.shape).to(tensor.device)
