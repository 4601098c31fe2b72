"""The chosen metrics of each task on one of three ranks; apart from the test, since ranks need no scikit-learn."""

from __future__ import annotations

import torch
from torch import Tensor

from distrain.config.schema import Config
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.tasks import chosen_metrics
from distrain.tasks.base import Task
from tests.tasks.helpers import task_for

CLASSES, COUNT = 4, 61
#: Sizes of the batches of each rank; the last rank has no sample.
SHARES = ((7, 7, 7, 2), (13, 25), ())
OWN = "{_target_: tests.tasks.own_metrics.Distances, kwargs: {scale: 2.0}, name: distances}"
EACH = "{_target_: torchmetrics.classification.MulticlassSpecificity, kwargs: {num_classes: 4, average: none}}"
CHOSEN = {
    "class": (
        "task=classification",
        "metrics=[accuracy,top2,top3,f1_macro,f1_weighted,precision_macro,precision_weighted,recall_macro,recall_weighted,"
        f"cohen_kappa,matthews,auroc,average_precision,{OWN},{EACH}]",
    ),
    "labels": (
        "task=multilabel",
        "loss=binary_cross_entropy",
        "metrics=[f1_macro,f1_weighted,precision_macro,precision_weighted,recall_macro,recall_weighted,auroc,"
        "average_precision]",
    ),
    "mask": ("task=segmentation", "metrics=[dice]"),
    "numbers": (
        "task=regression",
        "loss=mean_squared_error",
        "metrics=[rmse,mape,explained_variance]",
    ),
}


def samples(target: str) -> tuple[Tensor, Tensor]:
    """Outputs in which the targets can be guessed, in float32; the last class never occurs."""
    generator = torch.Generator().manual_seed(1)
    place = (5, 6) if target == "mask" else ()
    outputs = torch.randn(COUNT, CLASSES, *place, generator=generator)
    if target == "numbers":
        return outputs, outputs + torch.randn(COUNT, CLASSES, generator=generator)
    if target == "labels":
        return outputs, (outputs + torch.randn(COUNT, CLASSES, generator=generator) > 0).to(torch.uint8)
    classes = torch.randint(CLASSES - 1, (COUNT, *place), generator=generator)
    outputs.scatter_add_(1, classes.unsqueeze(1), torch.ones(COUNT, 1, *place))
    if target == "mask":
        classes[:, 2] = 255
        return outputs, classes.to(torch.uint8)
    return outputs, classes


def tasks() -> dict[str, Task]:
    """A task for each kind of targets, with all the metrics that it knows by name."""
    return {target: task_for(target, *options) for target, options in CHOSEN.items()}


def on_each_rank(config: Config, tasks: dict[str, Task]) -> list[chosen_metrics.ChosenValues]:
    """The metrics of all tasks, of this rank's share; a second time of samples that one rank has alone."""
    found, cpu = [], torch.device("cpu")
    with Runtime(config, World.from_environment()) as runtime:
        communicator = runtime.communicator()
        for shares in (SHARES, ((COUNT,), (), ())):
            for target, task in tasks.items():
                outputs, targets = samples(target)
                accumulator = chosen_metrics.Accumulator(task, cpu)
                start = sum(map(sum, shares[: communicator.rank]))
                for size in shares[communicator.rank]:
                    accumulator.update(outputs[start : start + size], targets[start : start + size])
                    start += size
                found.append(accumulator.finish(communicator, cpu))
    return found
