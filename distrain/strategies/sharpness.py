"""Sharpness-aware minimization: a step's gradient is taken near the parameters, where the loss is larger."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from distrain.config.schema import Config
from distrain.errors import ConfigError
from distrain.strategies.buffer_snapshot import BufferSnapshot
from distrain.torch_internals import foreach, foreach_copy


def check(config: Config, *, steps_alike: bool) -> None:
    """Refuses ``optimizer.sam_rho`` where a step can't be made of two passes over its batch.

    Args:
        config: The run's configuration.
        steps_alike: See :class:`distrain.strategies.base.Strategy`.

    Raises:
        ConfigError: The strategy can't, or gradients are compressed.
    """
    rho = config.optimizer.sam_rho
    if rho is None:
        return
    if not steps_alike:
        problem = f"strategy={config.strategy.name} can't make a step of two passes"
        raise ConfigError("optimizer.sam_rho", rho, problem, ["null"])
    if config.compression.name != "none":
        problem = f"a step has two gradients, and compression={config.compression.name} keeps errors of one"
        raise ConfigError("optimizer.sam_rho", rho, problem, ["null"])


class Sharpness:
    """Moves parameters to where the loss is larger, and back (Foret et al. 2020, arXiv 2010.01412, algorithm 1).

    BatchNorm's running statistics, and other buffers, stay those of the first pass.

    Args:
        rho: How far they are moved.
        modules: The modules of this rank.
    """

    def __init__(self, rho: float, modules: Iterable[nn.Module]) -> None:
        self._rho, self._modules = rho, list(modules)
        self._buffers = BufferSnapshot(self._modules)

    @contextlib.contextmanager
    def moved(self, norm: Tensor) -> Iterator[None]:
        """Parameters are moved in this block, along the gradient that they have at its beginning.

        Args:
            norm: Of the whole model's gradient, a scalar. The direction is the same if a loss scale multiplied both.
        """
        with torch.no_grad():
            parameters = [p for module in self._modules for p in module.parameters() if p.grad is not None]
            # Kept rather than subtracted again, so that no rounding is left.
            before = [parameter.detach().clone() for parameter in parameters]
            if parameters:
                step = foreach("mul", [p.grad for p in parameters if p.grad is not None], self._rho / (norm + 1e-12))
                foreach("add_", [parameter.detach() for parameter in parameters], step)
                # As large as the model, and the passes that follow need memory.
                del step
            self._buffers.take()
        yield
        with torch.no_grad():
            self._buffers.restore()
            if parameters:
                foreach_copy([parameter.detach() for parameter in parameters], before)
