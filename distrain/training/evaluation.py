"""Evaluation of a split: every sample once, counted exactly, on any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from distrain.communication.collectives import Communicator
from distrain.tasks.base import Evaluation, Task

if TYPE_CHECKING:
    from distrain.data.loader import Loader
    from distrain.strategies.base import Strategy


def evaluate(
    strategy: Strategy, task: Task, loader: Loader, communicator: Communicator, watch: Sequence[int] = ()
) -> Evaluation:
    """Runs a split through the model; all ranks call it together.

    Args:
        strategy: Holds the model.
        task: Measures the outputs.
        loader: This rank's shard of the split.
        communicator: All ranks.
        watch: Positions in the split for which :meth:`Task.decide` is wanted.
    """
    device = strategy.runtime.device
    state = task.metric_state(device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    positions = torch.tensor(list(watch), dtype=torch.int64)
    # With a flag at the end: whether this task decides anything.
    watched = torch.zeros(len(positions) + 1, dtype=torch.float64, device=device)
    for batch in loader.epoch(0):
        result = strategy.eval_step(batch)
        strategy.runtime.activity.progress += 1
        sums[0] += result.loss_sum
        sums[1] += result.count
        if result.outputs is None or not result.count:
            continue
        task.update_state(state, result.outputs, batch.targets)
        decisions = task.decide(result.outputs)
        if decisions is not None:
            slot, row = (positions[:, None] == batch.indices[None, :]).nonzero(as_tuple=True)
            watched[slot.to(device)] = decisions[row.to(device)].double()
            watched[-1] = 1
    # Each sample was seen by one rank, so sums over the ranks are the whole split's.
    loss, count = communicator.all_reduce(sums).tolist()
    for sum_of_ranks in state.values():
        communicator.all_reduce(sum_of_ranks)
    communicator.all_reduce(watched)
    state = {name: sum_of_ranks.cpu() for name, sum_of_ranks in state.items()}
    decided = watched[:-1].cpu() if watched[-1] else None
    return Evaluation(loss / count, int(count), task.results(state, int(count)), state, decided)
