"""What a configuration means on this rank: device, strategy, data source and task."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from distrain.compression import base as compression
from distrain.config.schema import Config
from distrain.data.augmentation.check import check_augmentation
from distrain.data.balance import class_weights
from distrain.data.base import DataSource, DataSpec, Splits, data_source
from distrain.errors import ConfigError, SampleError, config_error, config_error_from_line
from distrain.models import lora
from distrain.models.float64 import refuse_float64
from distrain.models.freezing import check_counts, freeze_schedule, train_only
from distrain.models.pruning import add_masks
from distrain.models.trial import ModelTrial
from distrain.optim import schedulers
from distrain.optim.optimizers import trial as optimizer_trial
from distrain.optim.optimizers.build import check_lookahead
from distrain.optim.optimizers.groups import check_groups
from distrain.runtime import launcher
from distrain.runtime.device import MPS, choose_backend, choose_device, is_mps
from distrain.runtime.world import World
from distrain.strategies import base as strategies
from distrain.strategies import sharpness
from distrain.strategies.base import Strategy
from distrain.strategies.precision import Precision
from distrain.tasks import base as tasks
from distrain.tasks.base import Task
from distrain.training import (
    auto_format,
    averaging,
    batch_sizes,
    chosen_callbacks,
    initial_weights,
    micro_batch,
    normalisation,
    pruning,
    resume,
)
from distrain.training.monitor import Monitor

log = logging.getLogger(__name__)

#: Numbers of ranks below this are tried to tell who started one rank how many the strategy needs.
_MOST_TRIED_RANKS = 65


@dataclass(frozen=True)
class RunPlan:
    """A run as this rank will do it, for everything between the configuration and the trainer.

    Attributes:
        config: The checked configuration.
        world: This rank's place among all.
        device: Where this rank computes.
        strategy: The class of the strategy.
        source: The data set, not loaded yet.
        spec: What the source says of itself before it is loaded.
        task: What the model is trained to do.
    """

    config: Config
    world: World
    device: torch.device
    strategy: type[Strategy]
    source: DataSource
    spec: DataSpec
    task: Task

    @classmethod
    def resolve(cls, config: Config, world: World, allowed: Sequence[str] | None = None) -> RunPlan:
        """Looks up what the configuration names.

        Args:
            config: The run's configuration.
            world: This rank's place.
            allowed: Dotted prefixes of data sets that may be imported, if the configuration comes from a run folder.

        Raises:
            ConfigError: There is no such device, backend or data, or the strategy can't run on so many ranks.
        """
        device = choose_device(config, world)
        choose_backend(config, device)  # Runtime uses it; here a backend that can't serve the device is refused.
        strategy = strategies.strategy_class(config)
        _check_ranks(strategy, config, world)
        source = data_source(config.data, allowed)
        spec = source.describe()
        statistics = normalisation.of_model(config, spec)
        if statistics is not None:
            data = dataclasses.replace(config.data, mean=[*statistics.mean], std=[*statistics.std])
            source = data_source(data)
        return cls(config, world, device, strategy, source, spec, tasks.build(config, spec))

    @functools.cached_property
    def monitor(self) -> Monitor:
        """What the best checkpoint is chosen by.

        Raises:
            ConfigError: See :meth:`distrain.training.monitor.Monitor.of`.
        """
        return Monitor.of(self.task)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the model's parameters and inputs."""
        return Precision(self.config.trainer.precision, self.device).dtype

    def memory_format(self, model: nn.Module) -> torch.memory_format:
        """Layout of inputs and convolution weights."""
        return auto_format.memory_format(self.config, self.device, model)

    def with_config(self, config: Config) -> RunPlan:
        """The same plan with other number formats or layouts."""
        return dataclasses.replace(self, config=config)

    def check(self, *, warn: bool = True) -> ModelTrial:
        """Refuses what can be refused without loading data or talking to other ranks.

        Args:
            warn: Whether to say which choices have no effect on this number of ranks.

        Returns:
            What a trial found out about the model.

        Raises:
            ConfigError: One line that names the key, the value and the choices.
        """
        config, world = self.config, self.world
        shards = self.strategy.data_parallel_size(config, world.size)
        if config.data.batch_size < shards:
            problem = f"the global batch is smaller than the {shards} ranks that share it"
            raise ConfigError("data.batch_size", config.data.batch_size, problem)
        compression.compressor_class(config).check(config)
        check_lookahead(config)
        averaging.check(config)
        micro_batch.check(config, self.strategy)
        if config.model.checkpoint_activations != "none":
            # Imports what else only a pipeline needs.
            from distrain.strategies.recomputation import set_up

            set_up.check(config, knows_memory=self.strategy.knows_memory)
        check_steps(config, self.strategy)
        check_counts(config)
        if world.rank == 0:
            # The rank that writes; the others' hosts need not have a logger's package.
            config.logger.check()
        chosen_callbacks.check(config)
        if config.data.balance == "loss":
            self.task.check_class_weights()
        check_augmentation(config.data.augment, self.spec)
        if config.data.augment.mixing.active:
            self.task.check_mixing()
        # Found now, so that it is refused now.
        _ = self.monitor
        resume.check(config)
        alone = world.size == 1 and warn
        if alone and config.compression.name != "none":
            log.warning("compression=%s is ignored: one process exchanges no gradients", config.compression.name)
        if alone and config.strategy.name != "single" and "TORCHELASTIC_RUN_ID" not in os.environ:
            several = launcher.command(sys.argv, os.environ, ranks=2)
            log.warning("strategy=%s on one process has nothing to divide; on two: %s", config.strategy.name, several)
        if alone and config.runtime.device == "auto" and torch.backends.mps.is_available():
            log.info("this machine's Apple GPU is not used; runtime.device=%s trains on it", MPS)
        precision = Precision(config.trainer.precision, self.device)
        trial = ModelTrial(
            config.model,
            in_channels=self.spec.channels,
            num_classes=self.task.output_size,
            image_size=(self.spec.height, self.spec.width),
            output_shape=self.task.output_shape,
            dtype=self.dtype,
            autocast=precision.autocast,
            extra_check=functools.partial(_prepare_and_check, config, self.strategy),
            most_bytes=self.strategy.most_trial_bytes(config),
        )
        trial.show(lambda model, images: self.strategy.check_passes(config, model, images, precision))
        if is_mps(self.device):
            if config.trainer.memory_format == "channels_last":
                problem = f"torch's BatchNorm has wrong gradients in this layout on an Apple GPU (device={MPS})"
                raise ConfigError("trainer.memory_format", "channels_last", problem, ["auto", "contiguous"])
            trial.show(lambda model, images: refuse_float64(config.model._target_, model, images))
        resume.check_model(config, trial.model, self.spec)
        if config.init.weights is not None and not resume.has_checkpoint(config):
            initial_weights.check(config.init, trial.model)
        return trial

    def load(self) -> Splits:
        """Loads the data, and finds the weights of their classes if ``data.balance=loss``.

        Raises:
            ConfigError: They can't be read.
        """
        try:
            splits = self.source.load()
            if self.config.data.balance == "loss":
                weights = class_weights(splits.train.class_numbers(), len(self.spec.classes))
                splits = dataclasses.replace(splits, class_weights=tuple(weights))
            return splits
        except SampleError as error:
            raise config_error("data", str(error)) from error

    def check_sizes(self, splits: Splits, trial: ModelTrial) -> None:
        """Refuses what can be refused only when the number of samples is known.

        Args:
            splits: The data.
            trial: Result of :meth:`check`.

        Raises:
            ConfigError: As :meth:`check`.
        """
        for purpose, split in (("train", splits.train), ("test", splits.test)):
            if not len(split):
                raise config_error("data", f"there is no image to {purpose} on")
        self.monitor.check_data(len(splits.val))
        steps_per_epoch = -(-len(splits.train) // self.config.data.batch_size)
        steps = total_steps(self.config, steps_per_epoch)
        schedulers.build(self.config.scheduler, steps_per_epoch, steps)
        pruning.rounds(self.config, steps_per_epoch, steps)
        batch_sizes.check(self.config, self.world.size, self.strategy, splits, trial)


def check_steps(config: Config, strategy: type[Strategy]) -> None:
    """Refuses an optimizer whose steps the strategy can't make.

    Raises:
        ConfigError: One line that names the key.
    """
    sharpness.check(config, steps_alike=strategy.steps_alike)
    if config.optimizer.has_modes and not strategy.steps_alike:
        problem = f"strategy={config.strategy.name} can't switch the parameters of all ranks to their averages"
        raise ConfigError("optimizer", config.optimizer.name, problem)


def _check_ranks(strategy: type[Strategy], config: Config, world: World) -> None:
    """Refuses a number of ranks on which the strategy can't run; says how to start more where only one was started."""
    try:
        strategy.check(config, world.size)
    except ConfigError as error:
        if world.size > 1 or "TORCHELASTIC_RUN_ID" in os.environ:
            raise
        enough = next((ranks for ranks in range(2, _MOST_TRIED_RANKS) if _accepts(strategy, config, ranks)), None)
        if enough is None:
            raise
        several = launcher.command(sys.argv, os.environ, ranks=enough)
        raise config_error_from_line(f"{error}; on {enough} ranks: {several}") from error


def _accepts(strategy: type[Strategy], config: Config, ranks: int) -> bool:
    try:
        strategy.check(config, ranks)
    except ConfigError:
        return False
    return True


def _prepare_and_check(config: Config, strategy: type[Strategy], model: nn.Module) -> None:
    lora.add(config.lora, model, config.seed)
    add_masks(config.prune, config.lora, model)
    check_groups(config.optimizer, model)
    freezing = freeze_schedule(config, model)
    if freezing is not None and strategy.set_trained is Strategy.set_trained:
        problem = f"strategy={config.strategy.name} can't freeze parameters, since it doesn't override set_trained()"
        raise config_error("freeze" if config.freeze else "lora", problem)
    if freezing is not None:
        train_only(model, freezing.ever_trained, freezing.parameters)
    strategy.check_model(config, model)
    optimizer_trial.check(config.optimizer, model, divided=strategy.divides_model, sliced=strategy.slices_parameters)


def total_steps(config: Config, steps_per_epoch: int) -> int:
    """Updates of the whole run."""
    steps = config.trainer.epochs * steps_per_epoch
    return steps if config.trainer.max_steps is None else min(steps, config.trainer.max_steps)
