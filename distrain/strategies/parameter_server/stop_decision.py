"""How workers that don't keep step agree on what all do after the same step.

A worker's wishes travel with its pushes. The first server, which sees every push, answers with a decision: a step that
no worker can have passed by the time it hears of it. So nobody waits, and a worker that dies holds up nobody.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distrain.runtime.consensus import Request

if TYPE_CHECKING:
    from distrain.strategies.parameter_server.client import Link


@dataclass
class Bulletin:
    """The server's side.

    Args:
        in_flight: Steps that a worker computes before it has the answer to a push.

    Attributes:
        step: Pushes after which every worker does what was decided last.
        wishes: That, as bits of :class:`distrain.runtime.consensus.Request`.
    """

    in_flight: int
    step: int = 0
    wishes: int = 0

    def hear(self, wish: int, pushes: int, all_pushes: Iterable[int]) -> None:
        """Takes a worker's wish.

        Args:
            wish: Its wishes; 0 for none.
            pushes: How many pushes came from it, this one included.
            all_pushes: The same of all workers that live.
        """
        # Until that step everybody repeats what is decided already.
        if wish and pushes > self.step:
            # The answer to each one's next push tells it, which it has when the steps under way are over.
            self.step = max(all_pushes) + 1 + self.in_flight
            self.wishes = wish


class Subscription:
    """A worker's side: the trainer's :class:`distrain.runtime.consensus.Consensus`.

    Args:
        links: To all servers; the first one's decides.
    """

    def __init__(self, links: list[Link]) -> None:
        self._links = links
        self._pushes = 0

    def agree(self, wish: Request) -> Request:
        """Sends the wish with the next push; see the protocol."""
        self._pushes += 1
        step, wishes = self._links[0].decided
        heard = Request(wishes) if step == self._pushes else Request.NOTHING
        for link in self._links:
            wish |= Request(link.servers_wish)
        self._links[0].wish = int(wish & ~heard)
        return heard

    def close(self) -> None:
        """Nothing is under way."""
