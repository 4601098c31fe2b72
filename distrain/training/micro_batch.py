"""``trainer.micro_batch_size=auto``: the fewest passes of a batch with which a training fits into memory.

A trial runs forward and backward passes of the run's own model, each rank by itself, with a few samples and then with
more. What they hold grows along a line with the number of samples, which says how many fit; a pass with so many is then
run. All ranks take as many passes as the rank that needs most.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distrain.config.schema import Config
from distrain.data.base import Splits
from distrain.data.batch import slice_targets
from distrain.errors import ConfigError
from distrain.models.foreign import auxiliary_weight
from distrain.models.layers import layer_depths
from distrain.optim.optimizers.build import build_optimizer
from distrain.runtime.agreement import agreed
from distrain.runtime.device import seed_everything
from distrain.runtime.live_memory import LiveMemory
from distrain.runtime.memory_limit import MIB, memory_limit
from distrain.runtime.runtime import Runtime
from distrain.strategies import held_memory
from distrain.strategies.base import Strategy
from distrain.strategies.precision import Precision
from distrain.tasks.base import Task
from distrain.tasks.training_loss import training_loss
from distrain.torch_internals import BatchNorm
from distrain.training import batch_sizes, resume
from distrain.training.memory import is_out_of_memory
from distrain.training.trial_batch import trial_batch

log = logging.getLogger(__name__)

AUTO, KEY = "auto", "trainer.micro_batch_size"
#: Samples of the first two passes. BatchNorm needs two.
_FIRST = (2, 4)
#: Updates of a run that never ends within the trial, for schedules of an optimizer.
_MANY_STEPS = 1000


def check(config: Config, strategy: type[Strategy]) -> None:
    """Refuses ``auto`` where no trial can tell.

    Raises:
        ConfigError: One line that names the key.
    """
    if config.trainer.micro_batch_size != AUTO:
        return
    if not strategy.knows_memory:
        problem = f"strategy={config.strategy.name} doesn't know a rank's memory before it runs"
        raise ConfigError(KEY, AUTO, problem, ["null", "a whole number"])
    if config.trainer.compile:
        problem = "trainer.compile changes what passes need in ways that a trial of the plain model doesn't show"
        raise ConfigError(KEY, AUTO, problem, ["null", "a whole number"])


@dataclass(frozen=True)
class Tried:
    """A training whose passes are tried.

    Attributes:
        config: The run's configuration, with number formats that are chosen.
        runtime: This rank's surroundings; its generators are seeded again after a trial.
        splits: The data; the trial uses training samples.
        task: Computes the loss.
        make_model: Builds the model on its device.
        strategy: Divides batches and state among ranks.
        layout: Memory layout of a model's inputs.
    """

    config: Config
    runtime: Runtime
    splits: Splits
    task: Task
    make_model: Callable[[], nn.Module]
    strategy: type[Strategy]
    layout: Callable[[nn.Module], torch.memory_format]

    @property
    def share(self) -> int:
        """Samples that a rank has of a batch, at most."""
        return math.ceil(
            self.config.data.batch_size / self.strategy.data_parallel_size(self.config, self.runtime.world.size)
        )

    def with_size(self, size: int | None) -> Config:
        """The configuration with so many samples a pass; ``None`` for a whole share."""
        return dataclasses.replace(self.config, trainer=dataclasses.replace(self.config.trainer, micro_batch_size=size))


def resolve(tried: Tried) -> Config:
    """Resolves ``auto``; all ranks call it together. A resumed run keeps the size that it had.

    Returns:
        The configuration with a number, or with ``null`` if a rank's whole share fits.

    Raises:
        ConfigError: On all ranks: not even the fewest samples fit on some rank.
    """
    config = tried.config
    if config.trainer.micro_batch_size != AUTO:
        return config
    saved = resume.saved_trainer_config(config, tried.runtime)
    size = saved.get("micro_batch_size", AUTO)
    if not isinstance(size, int | None):
        size = _by_trial(tried)
        seed_everything(config.seed)
    return tried.with_size(size)


def _by_trial(tried: Tried) -> int | None:
    """The number of samples of a pass; ``None`` for the whole share."""
    runtime, share = tried.runtime, tried.share
    pieces, problems = _fewest_pieces(tried)
    if runtime.device.type == "cuda":
        # The trial's model is gone by now.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(runtime.device)
    for problem in filter(None, problems):
        raise ConfigError(KEY, AUTO, problem)
    size = math.ceil(share / pieces)
    if runtime.is_main:
        log.info("%s=auto: %d of the %d samples that a rank has of a batch fit into a pass", KEY, size, share)
    return None if pieces == 1 else size


def _fewest_pieces(tried: Tried) -> tuple[int, list[str]]:
    """The fewest passes of a share that fit on all ranks, and for each rank why not even the most passes do."""
    runtime, share = tried.runtime, tried.share
    world, everyone, device = runtime.world, runtime.communicator(), runtime.device
    trains = world.rank < tried.strategy.full_model_ranks(tried.config, world.size)
    trial = agreed(everyone, runtime, lambda: _Trial(tried) if trains else None)

    def most(number: Callable[[], int]) -> int:
        return int(everyone.all_reduce(torch.tensor(agreed(everyone, runtime, number), device=device), "max"))

    def too_large() -> int:
        return int(trial is not None and not trial.fits(math.ceil(share / pieces)))

    most_pieces = most(lambda: trial.most_pieces if trial is not None else 1)
    pieces = most(lambda: trial.pieces() if trial is not None else 1)
    while pieces <= most_pieces and most(too_large):
        pieces += 1
    if pieces <= most_pieces:
        return pieces, []
    needs = agreed(everyone, runtime, lambda: trial.problem() if trial is not None else "")
    # If the same passes need less now, they are taken; more passes may be impossible.
    return most_pieces, [each["problem"] for each in everyone.all_gather_json({"problem": needs}, device)]


class _Trial:
    """Passes of this rank alone, and what they need.

    Args:
        tried: The training.

    Attributes:
        most_pieces: Most passes of a share.
    """

    def __init__(self, tried: Tried) -> None:
        self._tried, self._share, self._model = tried, tried.share, tried.make_model()
        config, runtime, model = tried.config, tried.runtime, self._model
        self._precision = Precision(config.trainer.precision, runtime.device)
        has_batchnorm = any(isinstance(layer, BatchNorm) for layer in model.modules())
        # If whole shares leave a sample alone, the model can run it.
        self._needs_two = has_batchnorm and not self._leaves_one(None)
        numbers = range(self._share // (2 if has_batchnorm else 1), 1, -1)
        sizes = ((pieces, math.ceil(self._share / pieces)) for pieces in numbers)
        self.most_pieces = next((pieces for pieces, size in sizes if self._is_possible(size)), 1)
        self._batch = trial_batch(tried.splits, self._share, runtime.device, self._precision.dtype, tried.layout(model))
        self._sizes = self._sizes_of_state()
        self._parameter_bytes = sum(parameter.nbytes for parameter in model.parameters())
        self._buffer_bytes = sum(buffer.nbytes for buffer in model.buffers())
        tried.strategy.prepare_trial(config, runtime.world.size, model)
        if config.model.checkpoint_activations != "none":
            # Imports what else only a pipeline needs.
            from distrain.strategies.recomputation import set_up

            set_up.apply(config, model, self._batch.inputs, self._precision.autocast)
        model.train()
        for parameter in model.parameters():
            # As in a training, where gradients have their memory all the time.
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        present = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        self._limit = memory_limit(config, runtime.world, runtime.device, present)

    def _leaves_one(self, size: int | None) -> bool:
        """Whether passes of at most so many samples leave a sample alone, of which BatchNorm has no statistics."""
        tried = self._tried
        ranks, images = tried.runtime.world.size, len(tried.splits.train)
        return batch_sizes.leaves_one(tried.with_size(size), ranks, tried.strategy, images)

    def _is_possible(self, size: int) -> bool:
        return not (self._needs_two and self._leaves_one(size))

    def _sizes_of_state(self) -> dict[str, int]:
        """Bytes of the whole model's state, of each kind."""
        config, model, strategy = self._tried.config, self._model, self._tried.strategy
        named = list(model.named_parameters())
        make = functools.partial(
            build_optimizer,
            config.optimizer,
            steps_per_epoch=_MANY_STEPS,
            total_steps=_MANY_STEPS,
            depths=layer_depths(model),
        )
        parameters = sum(parameter.nbytes for _, parameter in named)
        return {
            "parameters": parameters * (1 + held_memory.copies_of_parameters(config)),
            "gradients": sum(parameter.nbytes for _, parameter in named if parameter.requires_grad),
            "optimizer": held_memory.expected_optimizer_bytes(make, named) if strategy.trainers_update else 0,
        }

    def _held(self, samples: int) -> float:
        """What the rank will hold besides activations, if a pass has so many samples."""
        config = self._tried.with_size(samples if samples < self._share else None)
        strategy = self._tried.strategy
        shares = strategy.state_shares(config, self._tried.runtime.world.size)
        state = sum(whole * shares.get(kind, 1.0) for kind, whole in self._sizes.items())
        return self._buffer_bytes + state + strategy.gathered_bytes(config, self._parameter_bytes)

    def pieces(self) -> int:
        """Fewest passes of the share that should fit, by the line through the peaks of two small passes."""
        if self._limit is None:
            return 1
        low, high = (min(size, self._share) for size in _FIRST)
        first = self._peak(low)
        last = first if high == low else self._peak(high)
        slope = (last - first) / (high - low) if high > low else first / low
        left = self._limit - self._held(self._share) - first
        if not math.isfinite(left) or not math.isfinite(slope):
            return self.most_pieces
        most = low + math.floor(left / slope) if slope > 0 else self._share
        return min(math.ceil(self._share / min(max(most, 1), self._share)), self.most_pieces)

    def fits(self, size: int) -> bool:
        """Whether passes of at most so many samples are possible, and stay within the limit."""
        if not self._is_possible(size):
            return False
        return self._limit is None or self._held(size) + self._peak(min(size, self._share)) <= self._limit

    def problem(self) -> str:
        """Why not even the most passes make the share fit; empty if they do."""
        size = math.ceil(self._share / self.most_pieces)
        needed = self._held(size) + self._peak(size)
        if self._limit is None or needed <= self._limit:
            return ""
        world, limit = self._tried.runtime.world, f"{self._limit / MIB:,.1f} MiB"
        # Nobody knows how much a pass needs that ran out of memory.
        needs = f"needs {needed / MIB:,.1f} MiB for" if math.isfinite(needed) else "runs out of memory with"
        config = self._tried.config
        can_recompute = config.model.checkpoint_activations in ("none", "auto")
        ways = ["model.checkpoint_activations=all"] if can_recompute else []
        if keys := config.strategy.keys_for_less_memory(world.size):
            ways.append(keys)
        advice = f"; to need less, type {' and '.join(ways)}" if ways else ""
        return (
            f"rank {world.rank} on {world.host} {needs} the fewest samples that a pass may have ({size}), and may take "
            f"{limit}{advice}"
        )

    def _peak(self, size: int) -> float:
        """Most bytes that a forward and a backward pass hold; infinite if there is not enough memory for them."""
        device, task = self._tried.runtime.device, self._tried.task
        inputs = self._batch.inputs[:size].clone()
        targets = slice_targets(self._batch.targets, 0, len(inputs))
        live: Any = LiveMemory(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        try:
            with live, self._precision.autocast():
                outputs = self._model(inputs)
                _, loss, count = training_loss(task, outputs, targets, auxiliary_weight(self._tried.config.model))
            del outputs
            with live:
                (loss / count).backward()
        except Exception as error:
            if is_out_of_memory(error):
                return math.inf
            raise
        finally:
            for parameter in self._model.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()
        held = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else live.peak
        # The samples that the loader has of a batch.
        return float(held) + self._batch.inputs.nbytes * self._share / max(len(self._batch.inputs), 1)
