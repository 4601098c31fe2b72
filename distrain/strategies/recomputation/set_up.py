"""Sets up ``model.checkpoint_activations`` for a run."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distrain.communication.collectives import Communicator
from distrain.config.schema import Config
from distrain.errors import ConfigError
from distrain.runtime.runtime import Runtime
from distrain.strategies.recomputation import choice
from distrain.strategies.recomputation.block import recompute
from distrain.strategies.recomputation.choice import KEY, MIB
from distrain.strategies.recomputation.model_blocks import (
    Autocast,
    Passage,
    blocks_of,
    examine,
    examine_costs,
    peak_of,
)

log = logging.getLogger(__name__)

AUTO = "auto"
#: Samples of the passes in which blocks are measured: few, and more. BatchNorm needs two.
_FEW, _MANY = 2, 8


def check(config: Config, *, knows_memory: bool) -> None:
    """Refuses what can't go together with ``model.checkpoint_activations``.

    Args:
        config: The run's configuration.
        knows_memory: Whether the strategy can choose by memory.

    Raises:
        ConfigError: One line that names the key.
    """
    chosen = config.model.checkpoint_activations
    if chosen == "none":
        return
    if config.trainer.compile:
        problem = "torch.compile chooses by itself what it computes again, so model.checkpoint_activations must be none"
        raise ConfigError("trainer.compile", config.trainer.compile, problem, [False])
    if chosen != AUTO:
        return
    if not knows_memory:
        problem = f"strategy={config.strategy.name} doesn't know a rank's memory before it runs"
        raise ConfigError(KEY, AUTO, problem, ["none", "all", "a number N: every N-th block"])
    if config.trainer.micro_batch_size == AUTO:
        problem = "trainer.micro_batch_size=auto is chosen by the same memory; set one of the two"
        raise ConfigError(KEY, AUTO, problem, ["none", "all", "a number N: every N-th block"])


def apply(config: Config, model: nn.Module, example: Tensor, autocast: Autocast) -> None:
    """Makes the chosen blocks computed again, unless the choice depends on memory or there is none.

    Args:
        config: The run's configuration.
        model: The whole model; changed in place.
        example: Inputs ``[N, …]``.
        autocast: Context of forward passes.

    Raises:
        ConfigError: No block is worth it, or fewer than every N-th needs.
    """
    _apply(model, chosen_blocks(config, model, example, autocast))


def chosen_blocks(config: Config, model: nn.Module, example: Tensor, autocast: Autocast) -> list[str]:
    """Names of the blocks that :func:`apply` makes computed again; the model stays as it is."""
    chosen = config.model.checkpoint_activations
    if chosen in ("none", AUTO):
        return []
    passages = examine(model, _repeated(example, _FEW), autocast)
    names = choice.every_nth(passages, chosen if isinstance(chosen, int) else 1)
    log.info("activations of %d of %d blocks are computed again", len(names), len(blocks_of(model)))
    return names


def _repeated(example: Tensor, count: int) -> Tensor:
    """So many samples, some of them several times where there are fewer."""
    return torch.cat([example] * math.ceil(count / len(example)))[:count]


def _apply(model: nn.Module, names: list[str]) -> None:
    blocks = blocks_of(model)
    for name in names:
        recompute(name, blocks[name])


@dataclass(frozen=True)
class Measured:
    """The costs of a model's blocks.

    Attributes:
        passages: The calls of the blocks, with sizes for the largest pass of the run.
        samples: Of that pass.
    """

    passages: list[Passage]
    samples: int


def measure(config: Config, model: nn.Module, example: Tensor, autocast: Autocast, samples: int) -> Measured | None:
    """Measures the blocks if ``model.checkpoint_activations=auto``; all ranks call it together.

    Args:
        config: The run's configuration.
        model: The whole model, whose parameters have their values.
        example: Inputs ``[N, …]``.
        autocast: Context of forward passes.
        samples: Of the largest pass of the run.
    """
    if config.model.checkpoint_activations != AUTO:
        return None
    many = max(_FEW, min(samples, _MANY))
    few = _repeated(example, _FEW)
    return Measured(examine_costs(model, few, _repeated(example, many), autocast, samples), samples)


def apply_measured(
    measured: Measured, model: nn.Module, held: float, limit: float | None, ranks: Communicator, runtime: Runtime
) -> None:
    """Chooses blocks by their costs, and makes them computed again; all ranks call it together.

    A rank may have less memory than others. All compute the same blocks again, each those that some rank must.

    Args:
        measured: The costs.
        model: The whole model; changed in place.
        held: Bytes that this rank holds besides activations.
        limit: Bytes that it may hold; ``None``: nobody knows.
        ranks: Those that train the model.
        runtime: This rank's surroundings.

    Raises:
        ConfigError: On all ranks: a rank needs more even if all blocks are computed again.
    """
    budget = math.inf if limit is None else limit - held
    chosen = choice.fewest(measured.passages, budget)
    needed, problem = held + peak_of(measured.passages, chosen), ""
    if limit is not None and needed > limit:
        problem = (
            f"rank {runtime.world.rank} on {runtime.world.host} needs {needed / MIB:,.1f} MiB even if all blocks are "
            f"computed again, and may take {limit / MIB:,.1f}; a trainer.micro_batch_size below {measured.samples} "
            "needs less, and so does strategy=fsdp; or raise runtime.memory_limit_mb"
        )
    agreed = ranks.all_gather_json({"names": sorted(chosen), "problem": problem}, runtime.device)
    for each in agreed:
        if each["problem"]:
            raise ConfigError(KEY, AUTO, each["problem"])
    names = frozenset(str(name) for each in agreed for name in each["names"])
    _apply(model, sorted(names))
    if runtime.is_main:
        log.info("%s", choice.described(measured.passages, names, held))
