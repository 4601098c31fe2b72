"""Finds out ranks whose parameters differ after a merge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from distrain.communication.collectives import Communicator, digest
from distrain.communication.types import Pending


@dataclass
class _Comparison:
    step: int
    first_rank: int
    hashes: list[Tensor]
    pending: Pending


class Agreement:
    """Compares what must be equal by hash; the answer is read in the next step, so that nobody waits for it."""

    def __init__(self) -> None:
        self._under_way: list[_Comparison] = []

    def start(self, tensors: Iterable[Tensor], communicator: Communicator, first_rank: int, step: int) -> None:
        """Sends this rank's hash to the others.

        Args:
            tensors: What must be equal.
            communicator: Among whom.
            first_rank: The world's number of its first rank; the others follow.
            step: Steps done, for the message.
        """
        tensors = list(tensors)
        if communicator.size == 1 or not tensors:
            return
        hashes, pending = communicator.start_all_gather(digest(tensors).to(tensors[0].device))
        self._under_way.append(_Comparison(step, first_rank, hashes, pending))

    def check(self) -> None:
        """Reads the answers.

        Raises:
            RuntimeError: Ranks differ from what most have; it names them.
        """
        for comparison in self._under_way:
            comparison.pending.wait()
            hashes = torch.stack(comparison.hashes).tolist()
            common = Counter(hashes).most_common(1)[0][0]
            strays = [comparison.first_rank + index for index, each in enumerate(hashes) if each != common]
            if strays:
                ranks = f"rank {strays[0]}" if len(strays) == 1 else f"ranks {', '.join(map(str, strays))}"
                raise RuntimeError(
                    f"after the merge at step {comparison.step} the parameters of {ranks} are not those of the others"
                )
        self._under_way.clear()
