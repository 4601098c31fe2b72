"""How workers that don't run in lockstep agree on what all of them do after the same step, such as to stop or to save.

A worker's requests travel with its pushes. The first server, which sees every push, answers with a decision: the number
of a step that no worker can have passed by the time it learns of the decision. So no worker waits for another, and a
worker that dies delays nobody.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from typing_extensions import override

from distrain.runtime.consensus import Consensus, Request

if TYPE_CHECKING:
    from distrain.strategies.parameter_server.client import ServerClient


@dataclass
class StopDecision:
    """The server's side: the latest decision.

    Args:
        in_flight: Steps that a worker computes before it has the answer to a push.

    Attributes:
        step: The step after which every worker acts on the decision.
        requests: What the workers do then, as bits of :class:`distrain.runtime.consensus.Request`.
    """

    in_flight: int
    step: int = 0
    requests: int = 0

    def add_request(self, requests: int, pushes: int, all_pushes: Iterable[int]) -> None:
        """Takes the requests that came with a worker's push.

        Args:
            requests: The requests; 0 for none.
            pushes: Number of the worker's pushes, including this one.
            all_pushes: The same number for every worker that is alive.
        """
        # Until the decided step every worker repeats requests that are decided already.
        if requests and pushes > self.step:
            # Each worker learns of the decision from the answer to its next push, which it has when the steps that are
            # in flight are over.
            self.step = max(all_pushes) + 1 + self.in_flight
            self.requests = requests


class PushConsensus(Consensus):
    """A worker's side: its requests travel with its pushes, the decisions with the answers.

    Args:
        clients: The worker's clients of all servers; the first server decides.
    """

    def __init__(self, clients: list[ServerClient]) -> None:
        self._clients = clients
        self._pushes = 0

    @override
    def agree(self, request: Request) -> Request:
        self._pushes += 1
        step, decided_requests = self._clients[0].decision
        decided = Request(decided_requests) if step == self._pushes else Request.NOTHING
        for client in self._clients:
            request |= Request(client.server_requests)
        self._clients[0].requests = int(request & ~decided)
        return decided

    @override
    def close(self) -> None:
        # No message is pending.
        pass
