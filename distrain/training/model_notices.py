"""What a user must know of a model before it is trained: what can't be equal to one process, and what is changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distrain.config.schema import Config
from distrain.models.trial import ModelTrial
from distrain.strategies.base import Strategy
from distrain.strategies.batchnorm import replacement

#: Names shown in a line.
_SHOWN = 8


def model_notices(
    config: Config, world_size: int, strategy: type[Strategy], dtype: torch.dtype, trial: ModelTrial
) -> list[str]:
    """One line for each thing that a user may not expect; empty for most models.

    Args:
        config: The run's configuration.
        world_size: Number of ranks.
        strategy: Divides the batches.
        dtype: Floating-point format of the parameters in training.
        trial: What is known of the model.
    """
    notices = []
    if trial.ignored_outputs:
        weighted = f"; model.auxiliary_weight=0.3 adds a loss of {_listed(trial.auxiliary_outputs)}"
        ignored = f"the model's outputs {_listed(trial.ignored_outputs)} are ignored: the loss is that of its logits"
        notices.append(ignored + (weighted if trial.auxiliary_outputs else ""))
    if trial.unused:
        notices.append(f"the loss doesn't depend on parameters {_listed(trial.unused)}; they get no gradient")
    for original, names in trial.cast.items():
        in_training = str(dtype).removeprefix("torch.")
        notices.append(
            f"{_listed(names)}: {original} in the model, {in_training} in training, as trainer.precision="
            f"{config.trainer.precision} says"
        )
    sizes = strategy.forward_sizes(config, world_size, config.data.batch_size, training=True)
    ranks, pieces = sum(any(share) for share in sizes), max(map(len, sizes))
    if ranks * pieces == 1:
        return notices
    if ranks == 1:
        divided = f"a batch is run in {pieces} forward passes"
    elif pieces == 1:
        divided = f"{ranks} ranks share a batch"
    else:
        divided = f"{ranks} ranks share a batch, each in {pieces} forward passes"
    result = "so results differ from those of one process that runs it whole"
    if trial.has_batchnorm and (pieces > 1 or not strategy.normalises_together(config, world_size)):
        batchnorm = f"BatchNorm takes statistics of the samples that run at once, and {divided}, {result}"
        notices.append(f"{batchnorm}; {replacement(config.model)} is equal")
    if trial.draws_random:
        notices.append(f"the model draws random numbers, as dropout does, and {divided} with own draws, {result}")
    if trial.mixes_samples:
        notices.append(f"the model mixes the samples that it runs at once, and {divided}, {result}")
    if trial.buffers_of_samples:
        changed = _listed(trial.buffers_of_samples)
        notices.append(f"forward changes {changed} according to the samples that it sees, and {divided}, {result}")
    if trial.buffers_of_passes and pieces > 1:
        notices.append(f"each forward pass changes {_listed(trial.buffers_of_passes)}, and {divided}, {result}")
    return notices


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
