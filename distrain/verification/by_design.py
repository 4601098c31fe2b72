"""What can't equal one process by design: what is promised instead."""

from __future__ import annotations

from distrain.compression.auto import AutoConfig
from distrain.compression.base import LossyConfig
from distrain.compression.sparse import SparseConfig
from distrain.config.groups import CompressionConfig
from distrain.config.schema import Config
from distrain.strategies.base import strategy_class

#: What is true of every such run, and is checked.
_CHECKED = "every sample once, in the order of one process, with the same content; exact counts in evaluation"

_COMPRESSORS = {
    "bf16": "each gradient is rounded to 8 significant bits on the way",
    "fp16": "each gradient is rounded to 11 significant bits on the way, within fp16's range",
    "powersgd": "gradients of matrices are sent as products of thin matrices",
    "qsgd": "gradients are rounded at random to few levels, so that their mean is unchanged",
    "randomk": "a random part of each gradient is sent",
    "signsgd": "the signs of a gradient and one scale are sent",
    "topk": "the largest entries of each gradient are sent",
    "auto": "the compressor is chosen by measurement, and may be any of the lossy ones",
}


def statement(config: Config, world_size: int) -> list[str]:
    """Why a run is not meant to equal that of one process, and what holds instead; empty if it is meant to.

    Args:
        config: The run's configuration.
        world_size: Number of ranks.
    """
    found = [*_of_compression(config, world_size), *_of_strategy(config)]
    return [*found, f"checked: {_CHECKED}"] if found else []


def loss_of(compression: CompressionConfig) -> str:
    """What becomes of gradients in a compressor, in words; empty if it sends them as they are.

    Args:
        compression: The compressor's keys.
    """
    if isinstance(compression, AutoConfig) and compression.most_lossy == "none":
        return ""
    if isinstance(compression, SparseConfig):
        everything = compression.density == 1 and not compression.momentum_correction
        if everything and getattr(compression, "values", "full") == "full":
            return ""
    return _COMPRESSORS.get(compression.name, "")


def _of_compression(config: Config, world_size: int) -> list[str]:
    compression = config.compression
    loses = loss_of(compression)
    replicas = strategy_class(config).data_parallel_size(config, world_size)
    # Stages without replicas exchange no gradients.
    if not loses or (config.strategy.name in ("pipeline", "mesh") and replicas == 1):
        return []
    text = f"compression={compression.name}: {loses}"
    if isinstance(compression, LossyConfig) and compression.error_feedback:
        text += "; what is left out is added to the next step's gradient, so nothing is lost for good"
    return [text]


def _of_strategy(config: Config) -> list[str]:
    options = config.strategy
    if options.name == "local_sgd" and not _merges_like_ddp(config):
        every = getattr(options, "sync_every", None)
        return [
            f"strategy=local_sgd: each rank takes {every} steps by itself between merges, by its own gradients; the "
            "copies are equal after a merge among all ranks"
        ]
    mode = getattr(options, "mode", "sync")
    if options.name == "parameter_server" and mode != "sync":
        return [
            f"strategy=parameter_server, mode={mode}: servers apply each worker's gradient when it comes, and it may "
            "be of older parameters; no two runs are equal; the workers' copies are those of the servers at evaluation"
        ]
    return []


def _merges_like_ddp(config: Config) -> bool:
    """Whether local SGD is ddp's arithmetic: the mean of the copies after each step of plain SGD."""
    options, optimizer = config.strategy, config.optimizer
    plain = (
        optimizer.name == "sgd"
        and not getattr(optimizer, "momentum", 0)
        and config.trainer.grad_clip_norm is None
        and config.compression.name == "none"
    )
    wanted = {"sync_every": 1, "outer_optimizer": "average", "group_size": None, "overlap_steps": 0}
    return plain and all(getattr(options, key) == value for key, value in wanted.items())
