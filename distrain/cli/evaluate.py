"""Evaluates a run's model on the run's data; the result is the same on any number of ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distrain.cli import output
from distrain.cli.run_folder import LAST, RunFolder, Weights
from distrain.cli.settings import RunSettings
from distrain.config.groups import CompressionConfig, StrategyConfig
from distrain.config.schema import DEVICE_DOC, DEVICES, Config
from distrain.config.setting import setting
from distrain.data.augmentation.resize import resize_centre
from distrain.data.base import DataSpec, Split, Splits, source_class
from distrain.errors import ConfigError, config_error_from_line
from distrain.files.escaping import Lines
from distrain.files.terminal import show
from distrain.models.tensors import convert
from distrain.optim.optimizers.build import build_optimizer
from distrain.optim.optimizers.sgd import SGDConfig
from distrain.reporting.figures import cell_text
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.strategies.ddp import DDPConfig
from distrain.tasks import chosen_metrics
from distrain.tasks.base import Evaluation, Task, class_rows
from distrain.training.assembly import build_loader
from distrain.training.evaluation import evaluate
from distrain.training.run_plan import RunPlan

log = logging.getLogger(__name__)


@dataclass
class EvaluateSettings(RunSettings):
    """Keys of ``distrain evaluate``."""

    split: str = setting("Split to evaluate.", choices=("train", "val", "test"))
    data_root: str | None = setting(
        "Folder that contains the data on this machine; null: the run's data.root.", path=True
    )
    batch_size: int | None = setting(
        "Samples per evaluation step over all ranks; null: the run's data.eval_batch_size.", at_least=1
    )
    device: str = setting(DEVICE_DOC, choices=DEVICES)
    output: str | None = setting(
        "JSON file for the result; -: standard output; null: evaluation_<split>.json in the run's folder.", path=True
    )
    allow: list[str] = setting(
        "Dotted prefixes, besides distrain's, from which the run's model and choices may be imported; their code runs."
    )


def run(settings: EvaluateSettings, world: World | None = None) -> dict[str, Any]:
    """Evaluates a run's model; rank 0 prints and writes the result.

    Returns:
        The content of the result file, the same on all ranks.

    Raises:
        ConfigError: The run, the checkpoint, the data or the output can't be used; raised before any process group
            exists.
        Failed: The evaluation failed, and the failure has been reported.
    """
    world = world or World.from_environment()
    folder = RunFolder.open(settings.run, settings.allow)
    target = _output_path(settings, folder)
    if target is not None:
        output.check_writable(target)
    result, task = evaluate_run(folder, settings, world)
    if world.rank == 0:
        output.write_text(target, json.dumps(result, indent=2) + "\n")
        if target is not None:
            show(_table(result, task))
    return result


def evaluate_run(folder: RunFolder, settings: EvaluateSettings, world: World) -> tuple[dict[str, Any], Task]:
    """Evaluates a run's model.

    The run's own strategy is not used, since a checkpoint contains the unsplit model: every rank holds the whole model
    and evaluates a share of each batch. The model is not compiled, since that would take longer than it saves.

    Args:
        folder: The run.
        settings: As for :func:`run`; ``run`` and ``output`` are not used.
        world: This rank's place.

    Returns:
        The result, the same on all ranks, and what the model was trained to do.

    Raises:
        ConfigError: As :func:`run`.
        Failed: As :func:`run`.
    """
    config = config_for_evaluation(folder, settings, world)
    weights = folder.weights(settings.checkpoint, settings.weights)
    model = folder.model(weights, settings.allow)
    plan, splits = load_data(config, world, folder, settings.allow)
    images: Split = getattr(splits, settings.split)
    if not len(images):
        others = [name for name in ("train", "val", "test") if len(getattr(splits, name))]
        raise ConfigError("split", settings.split, "the run has no such images", others)
    chosen_metrics.check(plan.task)
    with contextlib.closing(splits), Runtime(config, world, keep_logs=False) as runtime:
        evaluation = _evaluate(plan, runtime, splits, images, model)
        # Ranks that were started with different settings would evaluate shares of different splits.
        if evaluation.count != len(images):
            raise RuntimeError(f"{evaluation.count} samples were evaluated, not the {len(images)} of the split")
    return _result(settings, weights, plan.task, evaluation), plan.task


def check(settings: EvaluateSettings, world: World) -> None:
    """Refuses what :func:`run` would refuse on these ranks, as far as that needs neither the weights nor the data.

    Args:
        settings: The keys.
        world: A rank's place among the ranks that are to be started.

    Raises:
        ConfigError: The run or the checkpoint can't be used, or the output can't be written.
    """
    folder = RunFolder.open(settings.run, settings.allow)
    target = _output_path(settings, folder)
    if target is not None:
        output.check_writable(target)
    folder.find_checkpoint(settings.checkpoint)
    RunPlan.resolve(config_for_evaluation(folder, settings, world), world, _data_prefixes(settings.allow))


def _output_path(settings: EvaluateSettings, folder: RunFolder) -> Path | None:
    if settings.output == "-":
        return None
    if settings.output is None:
        return folder.path / f"evaluation_{settings.split}.json"
    return Path(settings.output)


def config_for_evaluation(folder: RunFolder, settings: EvaluateSettings, world: World) -> Config:
    """The run's configuration, changed for an evaluation on this machine and these ranks."""
    strategy: StrategyConfig = StrategyConfig(name="single")
    if world.size > 1:
        # The remaining keys have no effect, since no gradients and no BatchNorm statistics are exchanged.
        strategy = DDPConfig(name="ddp", batchnorm="local", first_bucket_mb=1, bucket_mb=1, last_bucket_mb=0)
    config = folder.config
    source = source_class(config.data)
    changes = source.changes_for_evaluation(config.data, settings.data_root)
    changes |= source.changes_for_classes(config.data, folder.spec)
    if folder.class_weights is not None:
        # So they need not be found again, and other data don't change the loss.
        changes["balance"] = "none"
    if settings.batch_size is not None:
        changes["eval_batch_size"] = settings.batch_size
    return dataclasses.replace(
        config,
        strategy=strategy,
        compression=CompressionConfig(name="none"),
        # Nothing is updated, so a run's own optimizer need not be imported.
        optimizer=SGDConfig(name="sgd", lr=1.0, weight_decay=0.0, fused=False, momentum=0.0, nesterov=False),
        data=dataclasses.replace(config.data, **changes),
        trainer=dataclasses.replace(config.trainer, compile=False),
        runtime=dataclasses.replace(config.runtime, device=settings.device, backend="auto", threads=None),
        run_dir=str(folder.path),
    )


def load_data(config: Config, world: World, folder: RunFolder, allow: Sequence[str]) -> tuple[RunPlan, Splits]:
    """Loads the run's data, to be normalised and weighted as in the run.

    Raises:
        ConfigError: The data are not at the configured place, or their shape or classes are not those of the run.
    """
    try:
        plan = RunPlan.resolve(config, world, _data_prefixes(allow))
        splits = plan.load()
    except ConfigError as error:
        if not str(error).startswith("data.root"):
            raise
        raise config_error_from_line(f"{error}; data_root=FOLDER names the run's data where it is now") from error
    if splits.spec != folder.spec:
        problem = f"holds {_describe(splits.spec)}; the run was trained on {_describe(folder.spec)}"
        raise ConfigError("data_root", config.data.root, problem)
    weights = folder.class_weights or splits.class_weights
    return plan, dataclasses.replace(splits, mean=folder.mean, std=folder.std, class_weights=weights)


@contextlib.contextmanager
def loaded_splits(folder: RunFolder, data_root: str | None, allow: Sequence[str]) -> Iterator[Splits]:
    """The run's data inside this block, for one process.

    Args:
        folder: The run.
        data_root: As in :class:`EvaluateSettings`.
        allow: As in :class:`EvaluateSettings`.

    Raises:
        ConfigError: The data can't be read, or are not those of the run.
    """
    settings = EvaluateSettings(
        run=str(folder.path),
        checkpoint="newest",
        split="test",
        data_root=data_root,
        batch_size=None,
        device="cpu",
        output=None,
        allow=list(allow),
    )
    world = World(0, 1, 0, 1, "")
    _, splits = load_data(config_for_evaluation(folder, settings, world), world, folder, allow)
    with contextlib.closing(splits):
        yield splits


def load_test_images(folder: RunFolder, data_root: str | None, count: int, allow: Sequence[str]) -> Tensor:
    """Images of the run's test split, spread evenly over it, of the stored type and the model's size ``[n, C, H, W]``.

    Args:
        folder: The run.
        data_root: As in :class:`EvaluateSettings`.
        count: How many at most.
        allow: As in :class:`EvaluateSettings`.

    Raises:
        ConfigError: The data can't be read, or are not those of the run.
    """
    with loaded_splits(folder, data_root, allow) as splits:
        images = splits.test.pick(spread_evenly(count, len(splits.test)))
    return resize_centre(images, folder.config.data.eval_crop, folder.spec.height, folder.spec.width)


def spread_evenly(count: int, size: int) -> Tensor:
    """At most ``count`` of the positions of a split of a size, in order and at equal distances, int64."""
    return torch.arange(min(count, size)) * size // min(count, size)


def _data_prefixes(allow: Sequence[str]) -> list[str]:
    """Dotted prefixes of the data sets that a run's configuration may name."""
    return ["distrain.data", *allow]


def _describe(spec: DataSpec) -> str:
    names = ", ".join(spec.classes[:10]) + (", …" if len(spec.classes) > 10 else "")
    return f"{spec.channels}x{spec.height}x{spec.width} images of {len(spec.classes)} classes ({names})"


def _evaluate(plan: RunPlan, runtime: Runtime, splits: Splits, images: Split, model: nn.Module) -> Evaluation:
    runtime.activity.phase = "evaluation"
    if splits.class_weights is not None:
        plan.task.set_class_weights(splits.class_weights)
    strategy = plan.strategy(plan.config, runtime)
    layout = plan.memory_format(model)
    convert(model, plan.dtype, plan.device)
    model.to(memory_format=layout)  # type: ignore[call-overload]
    loader = build_loader(plan, strategy, splits, images, layout, training=False)
    first = next(loader.epoch(0))
    # If the run is in progress, ranks may have read different checkpoints; setup broadcasts the weights of rank 0.
    strategy.setup(model, plan.task, lambda named: build_optimizer(plan.config.optimizer, named), first.inputs)
    with torch.inference_mode():
        return evaluate(strategy, plan.task, loader, runtime.communicator())


def _result(settings: EvaluateSettings, weights: Weights, task: Task, evaluation: Evaluation) -> dict[str, Any]:
    return {
        "split": settings.split,
        "checkpoint": weights.path.name,
        "weights": settings.weights,
        "step": weights.step,
        **evaluation.metrics,
        "loss": evaluation.loss,
        "count": evaluation.count,
        **_details(task, evaluation),
    }


def _details(task: Task, evaluation: Evaluation) -> dict[str, Any]:
    """The task's lists of rows; the chosen metrics of each class become columns of the list that has a row for each."""
    details = task.details(evaluation.state)
    if not evaluation.per_class:
        return details
    size = len(task.spec.classes)
    for rows in details.values():
        if isinstance(rows, list) and len(rows) == size:
            for row, chosen in zip(rows, class_rows(task.spec.classes, evaluation), strict=True):
                row |= {name: value for name, value in chosen.items() if name not in row}
            return details
    return {**details, "per_class": class_rows(task.spec.classes, evaluation)}


def _table(result: dict[str, Any], task: Task) -> Lines:
    """The result for people: a line, and a table for each list of rows from the task, such as one row per class."""
    metrics = ", ".join(f"{name} {result[name]:.4f}" for name in task.validated)
    counted = f"{result['correct']} of {result['count']}" if "correct" in result else f"{result['count']} samples"
    of = result["checkpoint"] + ("" if result["weights"] == LAST else f" ({result['weights']})")
    lines = [f"{result['split']} of {of}: {metrics} ({counted}), loss {result['loss']:.4f}"]
    for entries in (value for value in result.values() if isinstance(value, list) and value):
        rows = [list(entries[0]), *([cell_text(value) for value in entry.values()] for entry in entries)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        for first, *cells in rows:
            padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
            lines.append("  ".join([first.ljust(widths[0]), *padded]))
    return Lines.of(lines)
