"""Lion: each number changes by the learning rate, in the direction of the sign of a mean of gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from distrain.config.groups import OptimizerConfig
from distrain.config.registry import register
from distrain.config.setting import setting
from distrain.errors import ConfigError
from distrain.optim.optimizers.vectorised import VectorisedOptimizer
from distrain.optim.uncompiled import without_compiler_hooks
from distrain.torch_internals import foreach


@dataclass
class LionConfig(OptimizerConfig):
    """Keys of ``optimizer=lion``."""

    betas: list[float] = setting(
        "Weight of the momentum against the gradient in an update, and decay rate of the momentum.", at_least=0, below=1
    )

    def __post_init__(self) -> None:
        """Refuses a number of rates other than two.

        Raises:
            ConfigError: ``betas`` doesn't have two elements.
        """
        if len(self.betas) != 2:
            raise ConfigError("optimizer.betas", self.betas, "must be two numbers")


class Lion(VectorisedOptimizer):
    """Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2), with decoupled weight decay.

    Args:
        params: Parameter groups.
        lr: Learning rate.
        betas: Weight of the momentum against the gradient in an update, and decay rate of the momentum.
        weight_decay: Weight decay.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @override
    def _update(self, parameters: list[nn.Parameter], gradients: list[Tensor], group: dict[str, Any]) -> None:
        (first, second), rate = group["betas"], group["lr"]
        momenta = self._moments(parameters, "exp_avg")
        if group["weight_decay"]:
            foreach("mul_", parameters, 1 - rate * group["weight_decay"])
        signs = foreach("sign_", foreach("lerp", momenta, gradients, 1 - first))
        foreach("add_", parameters, signs, alpha=-rate)
        foreach("lerp_", momenta, gradients, 1 - second)


@register("optimizer", "lion", LionConfig)
def lion(config: LionConfig, groups: list[dict[str, Any]], fused: bool | None) -> Lion:
    """Lion; ``fused`` is ignored, since there is one implementation."""
    first, second = config.betas
    return without_compiler_hooks(Lion)(groups, config.lr, (first, second), config.weight_decay)  # type: ignore[return-value]
