"""Builds the parts of a run from its plan: model, loaders, trainer."""

from __future__ import annotations

import functools
import logging
import math

import torch
from torch import nn

from distrain.data.augmentation import transforms
from distrain.data.base import Split, Splits
from distrain.data.batch import Batch
from distrain.data.loader import Loader, prefetch_depth
from distrain.health.mesh_place import sizes_of
from distrain.models import deferred, lora
from distrain.models.base import DataDependentInit
from distrain.models.build import instantiate_model
from distrain.models.freezing import freeze_schedule, train_only
from distrain.models.layers import layer_depths
from distrain.models.pruning import add_masks
from distrain.models.tensors import convert
from distrain.optim import schedulers
from distrain.optim.optimizers.build import build_optimizer
from distrain.optim.optimizers.groups import describe_rates
from distrain.reporting.loggers import base as loggers
from distrain.reporting.loggers import several
from distrain.runtime.agreement import agreed
from distrain.runtime.device import seed_everything
from distrain.runtime.runtime import Runtime
from distrain.strategies.base import Strategy
from distrain.training import callbacks, chosen_callbacks, initial_weights, resume
from distrain.training.callback_list import CallbackList
from distrain.training.pruning import Pruning
from distrain.training.run_plan import RunPlan, total_steps
from distrain.training.trainer import Trainer

log = logging.getLogger(__name__)


def build_model(plan: RunPlan, splits: Splits) -> nn.Module:
    """The model on its device, in its format, with initial parameters that depend on the seed, and the data, alone."""
    seed_everything(plan.config.seed)
    spec = plan.spec
    model = instantiate_model(
        plan.config.model,
        in_channels=spec.channels,
        num_classes=plan.task.output_size,
        image_size=(spec.height, spec.width),
    )
    if isinstance(model, DataDependentInit):
        model.initialise_from(splits.train, splits.mean, splits.std)
    lora.add(plan.config.lora, model, plan.config.seed)
    add_masks(plan.config.prune, plan.config.lora, model)
    convert(model, plan.dtype, plan.device)
    return model.to(memory_format=plan.memory_format(model))  # type: ignore[call-overload,no-any-return]


def _build_for(strategy: Strategy, plan: RunPlan, splits: Splits, *, whole: bool) -> nn.Module:
    """The model as the strategy begins with it.

    Args:
        strategy: Gets what computes the values of hollow tensors.
        plan: As for :func:`build_model`.
        splits: Likewise.
        whole: Build it whole in any case.
    """
    make = functools.partial(build_model, plan, splits)
    everyone = strategy.runtime.communicator()
    if whole or strategy.most_trial_bytes(plan.config) == math.inf:
        return agreed(everyone, strategy.runtime, make)
    model, values = agreed(everyone, strategy.runtime, lambda: deferred.build(make))
    # A rank on which that failed has the whole model, and all must set it up by the same steps.
    parted = torch.tensor(float(values is not None), device=plan.device)
    if everyone.all_reduce(parted) < everyone.size:
        model = agreed(everyone, strategy.runtime, lambda: model if values is None else make())
        values = None
    strategy.initial_values = values
    return model


def build_loader(
    plan: RunPlan,
    strategy: Strategy,
    splits: Splits,
    images: Split,
    layout: torch.memory_format,
    *,
    training: bool,
) -> Loader:
    """This rank's shard of one split."""
    data = plan.config.data
    if training and data.augment.image_transform._target_ is not None:
        workers = getattr(data, "workers", None)
        images = transforms.transformed(data.augment.image_transform, images, splits.spec, workers)
    return Loader(
        images,
        batch_size=data.batch_size if training else data.eval_batch_size,
        shard=strategy.data_shard,
        mean=splits.mean,
        std=splits.std,
        device=plan.device,
        dtype=plan.dtype,
        memory_format=layout,
        seed=plan.config.seed,
        shuffle=training,
        classes=images.class_numbers() if training and data.balance == "sampler" else None,
        augment=data.augment if training else None,
        prefetch=prefetch_depth(data, splits, plan.device),
        spec=splits.spec,
        shown=data.eval_crop,
    )


def build_trainer(plan: RunPlan, runtime: Runtime, splits: Splits) -> Trainer:
    """The trainer with all that it needs; all ranks call it together."""
    config = plan.config
    strategy = plan.strategy(config, runtime)
    runtime.activity.mesh = sizes_of(strategy.mesh)
    if splits.class_weights is not None:
        plan.task.set_class_weights(splits.class_weights)
    starts_from_file = config.init.weights is not None and not resume.will_resume(config, runtime)
    model = _build_for(strategy, plan, splits, whole=starts_from_file)
    strategy.freezing = freezing = freeze_schedule(config, model)
    if freezing is not None:
        train_only(model, freezing.ever_trained, freezing.parameters)
        if runtime.is_main and config.lora.rank is not None:
            log.info("%s", lora.describe(config.lora, model, freezing.ever_trained))
    if starts_from_file:
        initial_weights.load(config.init, runtime, model)
    layout = plan.memory_format(model)

    def start_loaders() -> tuple[dict[str, Loader], Batch]:
        parts = {"train": splits.train, "val": splits.val, "test": splits.test}
        loaders = {
            name: build_loader(plan, strategy, splits, images, layout, training=name == "train")
            for name, images in parts.items()
        }
        return loaders, next(loaders["train"].epoch(0))

    loaders, first = agreed(runtime.communicator(), runtime, start_loaders)
    steps_per_epoch = len(loaders["train"])
    steps = total_steps(config, steps_per_epoch)
    make_optimizer = functools.partial(
        build_optimizer,
        config.optimizer,
        steps_per_epoch=steps_per_epoch,
        total_steps=steps,
        depths=layer_depths(model),
        dimensions={name: each.dim() for name, each in model.named_parameters(remove_duplicate=False)},
    )
    if runtime.is_main and config.optimizer.layer_decay is not None:
        log.info("learning rates by layer:\n%s", describe_rates(config.optimizer, model))
    strategy.saved_layout = resume.saved_layout(config, runtime)
    # Counted before a strategy splits the model.
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    strategy.setup(model, plan.task, make_optimizer, first.inputs)

    def start_observers() -> tuple[loggers.Logger, CallbackList]:
        logger = several.build(config, runtime.run_dir, runtime.owner) if runtime.is_main else loggers.Logger()
        default = callbacks.default_callbacks(config.trainer, runtime.run_dir, is_main=runtime.is_main)
        return logger, CallbackList(default, chosen_callbacks.build(config, is_main=runtime.is_main))

    # Servers have no part in it: they must serve, since workers may need them during set-up already.
    logger, called = agreed(strategy.training_group, runtime, start_observers)
    trainer = Trainer(
        plan,
        runtime,
        strategy,
        splits,
        loaders,
        schedulers.build(config.scheduler, steps_per_epoch, steps),
        logger,
        called,
        Pruning(config, steps_per_epoch, steps, strategy),
    )
    trainer.report.parameters = {
        "count": sum(size for size, _ in sizes),
        "trainable": sum(size for size, is_trainable in sizes if is_trainable),
    }
    return trainer
