"""Finds ranks whose parameters differ from the others' after a merge."""

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
    """An all-gather of hashes that is under way."""

    step: int
    first_rank: int
    hashes: list[Tensor]
    pending: Pending


class DivergenceCheck:
    """Compares tensors that must be equal on all ranks, by hash.

    The hashes of one step are compared in the next one, so that no rank waits for them.
    """

    def __init__(self) -> None:
        self._under_way: list[_Comparison] = []

    def start(self, tensors: Iterable[Tensor], communicator: Communicator, first_rank: int, step: int) -> None:
        """Sends this rank's hash to the others; all ranks of the group call it together.

        Args:
            tensors: Tensors that must be equal on all ranks of the group.
            communicator: The group; its ranks are consecutive.
            first_rank: Global rank of its first member.
            step: Number of training steps done, for the error message.
        """
        tensors = list(tensors)
        if communicator.size == 1 or not tensors:
            return
        hashes, pending = communicator.start_all_gather(digest(tensors).to(tensors[0].device))
        self._under_way.append(_Comparison(step, first_rank, hashes, pending))

    def check(self) -> None:
        """Waits for the hashes under way and compares them.

        Raises:
            RuntimeError: Some ranks' hash is not the most common one; the message names those ranks.
        """
        for comparison in self._under_way:
            comparison.pending.wait()
            hashes = torch.stack(comparison.hashes).tolist()
            most_common = Counter(hashes).most_common(1)[0][0]
            divergent = [comparison.first_rank + index for index, value in enumerate(hashes) if value != most_common]
            if divergent:
                ranks = f"rank {divergent[0]}" if len(divergent) == 1 else f"ranks {', '.join(map(str, divergent))}"
                raise RuntimeError(
                    f"after the merge at step {comparison.step} the parameters of {ranks} differ from the others'"
                )
        self._under_way.clear()
