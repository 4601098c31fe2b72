"""From a checked configuration to a finished run: the steps that every command shares, in their order."""

from __future__ import annotations

import functools
import logging
from dataclasses import asdict
from typing import Any

import torch

from distrain.compression import base as compression
from distrain.config.load import to_container
from distrain.config.registry import choice
from distrain.config.schema import Config
from distrain.data.base import DataSource, Images, Splits
from distrain.data.loader import Loader, prefetch_depth
from distrain.errors import ConfigError, config_error
from distrain.files.writing import write_json, write_yaml
from distrain.models.base import DataDependentInit
from distrain.models.build import check_model, instantiate_model
from distrain.optim import schedulers
from distrain.optim.optimizers.build import build_optimizer, check_optimizer
from distrain.optim.optimizers.groups import check_groups
from distrain.reporting import loggers
from distrain.runtime.device import choose_backend, choose_device, seed_everything
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.strategies import base as strategy_base
from distrain.strategies.base import Strategy
from distrain.strategies.precision import Precision
from distrain.tasks import base as tasks
from distrain.tasks.base import Task
from distrain.training import auto_format, callbacks, resume
from distrain.training.trainer import Trainer, total_steps

log = logging.getLogger(__name__)


def train(config: Config, world: World | None = None) -> dict[str, Any]:
    """Checks, loads, trains, and returns what ``summary.json`` holds.

    Args:
        config: The run's configuration.
        world: This rank's place; by default from the launcher's environment.

    Raises:
        ConfigError: The configuration can't run; raised before any process group forms.
        Failed: The run failed; which rank, where and why was said.
    """
    world = world or World.from_environment()
    check(config, world)
    splits = source(config).load()
    task = tasks.build(config, splits.spec)
    check_sizes(config, splits)
    with Runtime(config, world) as runtime:
        runtime.activity.phase = "set-up"
        config = settled(config, runtime, splits, task)
        if runtime.is_main:
            write_yaml(runtime.run_dir / "config.yaml", to_container(config))
            write_json(runtime.run_dir / "data.json", described(splits))
            log.info("run folder: %s", runtime.run_dir)
        trainer = build_trainer(config, runtime, splits)
        summary = trainer.fit()
        if runtime.is_main:
            log.info("%s", closing_line(summary, task))
    return summary


def described(splits: Splits) -> dict[str, Any]:
    """What somebody who has the run but not the data must know to use the model; the content of ``data.json``."""
    return {**asdict(splits.spec), "mean": list(splits.mean), "std": list(splits.std)}


def source(config: Config) -> DataSource:
    """The data set that the configuration names."""
    made: DataSource = choice("data", config.data.name).target(config.data)
    return made


def check(config: Config, world: World) -> None:
    """Refuses all that can be refused without loading data or talking to other ranks, and names unused parameters.

    Raises:
        ConfigError: One line that names the key, the value and the choices.
    """
    device = choose_device(config, world)
    choose_backend(config, device)
    strategy_base.chosen(config).check(config, world.size)
    shares = strategy_base.chosen(config).shares(config, world.size)
    if config.data.batch_size < shares:
        raise ConfigError(
            "data.batch_size",
            config.data.batch_size,
            f"the global batch is smaller than the {shares} ranks that share it",
        )
    compression.compressor_class(config).check(config)
    check_optimizer(config)
    resume.check(config)
    if world.size == 1 and config.compression.name != "none":
        log.warning("compression=%s has nothing to do: one process exchanges no gradients", config.compression.name)
    spec = source(config).describe()
    unused = check_model(
        config.model,
        in_channels=spec.channels,
        num_classes=tasks.build(config, spec).output_size,
        image_size=(spec.height, spec.width),
        extra_check=functools.partial(_check_model, config),
    )
    if unused and world.rank == 0:
        log.warning("the loss doesn't depend on parameters %s; they get no gradient", ", ".join(unused))


def _check_model(config: Config, model: torch.nn.Module) -> None:
    strategy_base.chosen(config).check_model(config, model)
    check_groups(config.optimizer.groups, model)


def check_sizes(config: Config, splits: Splits) -> None:
    """What can be refused only when the number of images is known.

    Raises:
        ConfigError: As :func:`check`.
    """
    if not len(splits.train):
        raise config_error("data", "there is no image to train on")
    if not len(splits.test):
        raise config_error("data", "there is no image to test on")
    steps_per_epoch = -(-len(splits.train) // config.data.batch_size)
    schedulers.build(config.scheduler, steps_per_epoch, total_steps(config, steps_per_epoch))


def memory_format(config: Config, device: torch.device, model: torch.nn.Module) -> torch.memory_format:
    """The layout of images and convolution weights; ``auto`` follows :mod:`distrain.training.auto_format`."""
    wanted = config.trainer.memory_format
    if wanted == "auto":
        wanted = auto_format.usual_layout(config.trainer.precision, device, model)
    return auto_format.LAYOUTS[wanted]


def settled(config: Config, runtime: Runtime, splits: Splits, task: Task) -> Config:
    """The configuration with the fastest formats in the place of ``auto``."""
    return auto_format.settled(config, runtime, splits, task, functools.partial(build_model, config, runtime, splits))


def make_loader(
    config: Config,
    strategy: Strategy,
    splits: Splits,
    images: Images,
    layout: torch.memory_format,
    *,
    training: bool,
) -> Loader:
    """This rank's shard of one split."""
    device = strategy.runtime.device
    return Loader(
        images,
        batch_size=config.data.batch_size if training else config.data.eval_batch_size,
        shard=strategy.data_shard,
        mean=splits.mean,
        std=splits.std,
        device=device,
        dtype=Precision(config.trainer.precision, device).dtype,
        memory_format=layout,
        seed=config.seed,
        shuffle=training,
        augment=config.data.augment if training else None,
        prefetch=prefetch_depth(config.data, splits, device),
    )


def build_model(config: Config, runtime: Runtime, splits: Splits) -> torch.nn.Module:
    """The model on its device, in its format, with initial parameters that depend on the seed, and the data, alone."""
    seed_everything(config.seed)
    spec = splits.spec
    model = instantiate_model(
        config.model,
        in_channels=spec.channels,
        num_classes=tasks.build(config, spec).output_size,
        image_size=(spec.height, spec.width),
    )
    if isinstance(model, DataDependentInit):
        model.initialise_from(splits.train, splits.mean, splits.std)
    dtype = Precision(config.trainer.precision, runtime.device).dtype
    model.to(device=runtime.device, dtype=dtype)
    # One call can't change type and layout: nn.Module.to has no overload for both.
    return model.to(memory_format=memory_format(config, runtime.device, model))  # type: ignore[call-overload,no-any-return]


def build_trainer(config: Config, runtime: Runtime, splits: Splits) -> Trainer:
    """All parts of a run, put together."""
    task = tasks.build(config, splits.spec)
    strategy = strategy_base.build(config, runtime)
    model = build_model(config, runtime, splits)
    layout = memory_format(config, runtime.device, model)
    parts = {"train": splits.train, "val": splits.val, "test": splits.test}
    loaders = {
        name: make_loader(config, strategy, splits, images, layout, training=name == "train")
        for name, images in parts.items()
    }
    first = next(loaders["train"].epoch(0))
    steps_per_epoch = len(loaders["train"])
    make_optimizer = functools.partial(
        build_optimizer,
        config.optimizer,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps(config, steps_per_epoch),
    )
    strategy.setup(model, task, make_optimizer, first.inputs)
    return Trainer(
        config,
        runtime,
        strategy,
        task,
        splits,
        loaders,
        schedulers.build(config.scheduler, steps_per_epoch, total_steps(config, steps_per_epoch)),
        loggers.build(config, runtime.run_dir) if runtime.is_main else loggers.Logger(),
        callbacks.default_callbacks(config.trainer, runtime.run_dir, is_main=runtime.is_main),
    )


def closing_line(summary: dict[str, Any], task: Task) -> str:
    """What a user wants to know at the end of a run, in one line."""
    score = task.metrics[0]
    parts = ", ".join(f"{name} {share:.0%}" for name, share in summary["time_share"].items())
    return (
        f"test_{score} {summary[f'test_{score}']:.4f}, test_loss {summary['test_loss']:.4f} | "
        f"{summary['steps']} steps in {summary['wall_seconds']:.1f} s, {summary['images_per_second']:,.0f} images/s | "
        f"{parts}"
    )
