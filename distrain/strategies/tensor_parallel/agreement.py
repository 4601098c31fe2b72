"""Ranks that do the same things at the same time, and stop together where one of them can't go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from distrain.communication.collectives import Communicator
from distrain.errors import described

T = TypeVar("T")


class Apart(Exception):
    """A rank failed, or the ranks did different things; the message is the same on all of them."""


class WatchedRun:
    """What ranks run together and might not all be able to, such as passes of a model that was just divided.

    Before each sum, and at the end, each rank tells the others what it is about to do. So no rank waits for one that
    has failed, and none adds up tensors that don't belong together.

    Args:
        group: The ranks.
        device: On which they communicate.
    """

    def __init__(self, group: Communicator, device: torch.device) -> None:
        self._group, self._device = group, device
        self._apart = ""

    def run(self, function: Callable[[], T]) -> T:
        """Calls a function on all ranks.

        Raises:
            Apart: On all ranks, if the function raises anything on one of them.
        """
        problem, result = "", None
        try:
            result = function()
        except Exception as error:  # a user's forward may raise anything
            problem = described(error)
        self._meet(problem, None)
        return cast(T, result)

    def before_sum(self, tensor: Tensor) -> None:
        """To be called before ranks sum a tensor.

        Raises:
            Apart: On all ranks, if one of them doesn't sum such a tensor now.
        """
        self._meet("", [str(tensor.dtype).removeprefix("torch."), *tensor.shape])

    def _meet(self, problem: str, summed: list[Any] | None) -> None:
        # A user's forward may have caught the error, and the others wait no longer.
        if not self._apart:
            ranks = self._group.all_gather_json({"problem": problem, "summed": summed}, self._device)
            problems = [rank["problem"] for rank in ranks if rank["problem"]]
            if not problems and any(rank["summed"] != ranks[0]["summed"] for rank in ranks):
                shown = [f"{rank['summed'] or 'nothing'} on rank {index}" for index, rank in enumerate(ranks)]
                problems = [f"(its ranks would sum different tensors: {', '.join(shown)})"]
            self._apart = "".join(problems[:1])
        if self._apart:
            raise Apart(self._apart)
