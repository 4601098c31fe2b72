"""Exact evaluation of a split on any number of ranks: every sample counts once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from distrain.communication.collectives import Communicator
from distrain.data.batch import map_targets
from distrain.data.loader import Loader
from distrain.runtime.device import float64_device
from distrain.strategies.base import Strategy
from distrain.tasks import chosen_metrics
from distrain.tasks.base import Evaluation, Task


class EvaluationStopped(Exception):
    """All ranks have agreed to stop an evaluation before its end; the message says why."""


def evaluate_in_training(
    strategy: Strategy, task: Task, loader: Loader, watch: Sequence[int], why_stop: Callable[[], str | None]
) -> Evaluation:
    """As :func:`evaluate`, on the ranks that train, some of which may be lost meanwhile."""
    loader.shard = strategy.agree_on_shard()
    while True:
        evaluation = evaluate(strategy, task, loader, strategy.training_group, watch, why_stop)
        shard, loader.shard = loader.shard, strategy.agree_on_shard()
        # A rank that left meanwhile took its share with it.
        if loader.shard == shard:
            return evaluation


def evaluate(
    strategy: Strategy,
    task: Task,
    loader: Loader,
    communicator: Communicator,
    watch: Sequence[int] = (),
    why_stop: Callable[[], str | None] = lambda: None,
) -> Evaluation:
    """Evaluates the model on a split; all ranks call it together.

    Args:
        strategy: Runs the model.
        task: Computes the metrics of the outputs.
        loader: Batches of this rank's shard of the split.
        communicator: The ranks that share the split.
        watch: Positions of samples in the split whose decision (see :meth:`Task.decide`) is returned.
        why_stop: Called after every batch; returns why all ranks stop there, the same on each of them.

    Returns:
        The result over all ranks, the same on each of them.

    Raises:
        EvaluationStopped: ``why_stop`` gave a reason.
    """
    # Where the metrics are computed too, so that they are the same on every device.
    device = float64_device(strategy.runtime.device)
    state, chosen = task.metric_state(device), chosen_metrics.Accumulator(task, device)
    loss_and_count = torch.zeros(2, dtype=torch.float64, device=device)
    positions = torch.tensor(list(watch), dtype=torch.int64)
    # The last element is a flag: whether the task makes decisions.
    watched = torch.zeros(len(positions) + 1, dtype=torch.float64, device=device)
    activity, batches = strategy.runtime.activity, len(loader)
    activity.batches = (0, batches)
    for done, batch in enumerate(loader.epoch(0), 1):
        result = strategy.eval_step(batch)
        activity.batches = (done, batches)
        activity.progress += 1
        loss_and_count[0] += result.loss_sum.to(device)
        loss_and_count[1] += result.count
        if reason := why_stop():
            raise EvaluationStopped(reason)
        if result.outputs is None or not result.count:
            continue
        outputs = result.outputs.to(device)
        targets = map_targets(lambda tensor: tensor.to(device), batch.targets)
        task.update_state(state, outputs, targets)
        chosen.update(outputs, targets)
        decisions = task.decide(outputs)
        if decisions is not None:
            index, row = (positions[:, None] == batch.indices[None, :]).nonzero(as_tuple=True)
            watched[index.to(device)] = decisions[row.to(device)].double()
            watched[-1] = 1
    # Exactly one rank has seen each sample, so the sums over ranks are those of the whole split.
    loss, count = communicator.all_reduce(loss_and_count).tolist()
    for metric_sum in state.values():
        communicator.all_reduce(metric_sum)
    communicator.all_reduce(watched)
    state = {name: metric_sum.cpu() for name, metric_sum in state.items()}
    decisions = watched[:-1].cpu() if watched[-1] else None
    values = chosen.finish(communicator, device)
    # A metric that is not defined for the split is NaN.
    metrics = {**dict.fromkeys(task.validated, math.nan), **task.results(state, int(count)), **values.values}
    return Evaluation(loss / count, int(count), metrics, state, decisions, values.per_class)
