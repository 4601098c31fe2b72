"""AdamW without a schedule: the model that is evaluated is an average of those that the steps lead to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from distrain.config.registry import register
from distrain.config.setting import setting
from distrain.errors import ConfigError, config_error
from distrain.optim.optimizers.adam import AdamConfig
from distrain.optim.optimizers.vectorised import VectorisedOptimizer
from distrain.optim.uncompiled import without_compiler_hooks
from distrain.torch_internals import foreach

_END, _TRAINED = "z", "y"


@dataclass
class ScheduleFreeAdamWConfig(AdamConfig):
    """Keys of ``optimizer=schedule_free_adamw``."""

    betas: list[float] = setting(
        "Weight of the average in the parameters that are trained, above 0; and decay rate of the second moment.",
        at_least=0,
        below=1,
    )

    def __post_init__(self) -> None:
        """Refuses what would break the relation of the parameters to the average.

        Raises:
            ConfigError: ``betas`` begins with 0, lookahead is set, or a group is frozen after some epochs.
        """
        super().__post_init__()
        if not self.betas[0]:
            raise ConfigError("optimizer.betas", self.betas, "must begin with a number above 0")
        if self.lookahead.every is not None:
            problem = f"optimizer={self.name} averages by itself"
            raise ConfigError("optimizer.lookahead.every", self.lookahead.every, problem, ["null"])
        if any(group.epochs is not None for group in self.groups):
            raise config_error("optimizer.groups", f"epochs: optimizer={self.name} can't freeze a group; use freeze")

    @property
    @override
    def has_modes(self) -> bool:
        return True


class ScheduleFreeAdamW(VectorisedOptimizer):
    """Schedule-free AdamW (Defazio et al. 2024, arXiv 2405.15682).

    Three sequences belong to a parameter: ``z``, to which steps lead; ``x``, the average of all ``z`` with weights that
    are the square of the largest rate so far; and ``y = (1 - beta) z + beta x``, where gradients are taken. In training
    the parameter holds ``y``, and after :meth:`eval` it holds ``x``, while ``y`` is kept in the state, so that
    :meth:`train` gives back the same bits. ``z`` is in the state always.

    Args:
        params: Parameter groups.
        lr: Learning rate.
        betas: Weight of the average in the parameters that are trained, and decay rate of the second moment.
        eps: Added to the square root of the second moment.
        weight_decay: Weight decay, at ``y``, times the learning rate.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def eval(self) -> None:
        """Makes the parameters the average; does nothing where they are."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if _END in state and _TRAINED not in state:
                    state[_TRAINED] = parameter.clone()
                    parameter.lerp_(state[_END], 1 - 1 / group["betas"][0])

    @torch.no_grad()
    def train(self) -> None:
        """Makes the parameters those that are trained; does nothing where they are."""
        for parameter, state in self.state.items():
            if _TRAINED in state:
                parameter.copy_(state.pop(_TRAINED))

    @override
    def _update(self, parameters: list[nn.Parameter], gradients: list[Tensor], group: dict[str, Any]) -> None:
        (beta, second), rate = group["betas"], group["lr"]
        self.train()
        for parameter in parameters:
            if _END not in self.state[parameter]:
                self.state[parameter][_END] = parameter.clone()
        ends, counts = self._moments(parameters, _END), self._count(parameters)
        squares, weights = self._moments(parameters, "exp_avg_sq"), self._weights(parameters, rate)
        foreach("mul_", squares, second)
        foreach("addcmul_", squares, gradients, gradients, value=1 - second)
        scale = foreach("sqrt", foreach("div", squares, [1 - second**count for count in counts]))
        foreach("add_", scale, group["eps"])
        updates = foreach("div", gradients, scale)
        if group["weight_decay"]:
            foreach("add_", updates, parameters, alpha=group["weight_decay"])
        # x moves towards the new z by the weight of this update, and y with it.
        foreach("add_", parameters, foreach("mul", foreach("sub", ends, parameters), weights))
        steps = foreach("mul", updates, [rate * (beta * (1 - weight) - 1) for weight in weights])
        foreach("add_", parameters, steps)
        foreach("add_", ends, updates, alpha=-rate)

    def _weights(self, parameters: list[nn.Parameter], rate: float) -> list[float]:
        """The share of this update in the average of each parameter."""
        shares = []
        for parameter in parameters:
            state = self.state[parameter]
            state["largest_rate"] = largest = max(state.get("largest_rate", 0.0), rate)
            state["weight_sum"] = total = state.get("weight_sum", 0.0) + largest**2
            shares.append(largest**2 / total if total else 0.0)
        return shares


@register("optimizer", "schedule_free_adamw", ScheduleFreeAdamWConfig)
def schedule_free_adamw(
    config: ScheduleFreeAdamWConfig, groups: list[dict[str, Any]], fused: bool | None
) -> ScheduleFreeAdamW:
    """Schedule-free AdamW; ``fused`` is ignored, since there is one implementation."""
    first, second = config.betas
    return without_compiler_hooks(ScheduleFreeAdamW)(  # type: ignore[return-value]
        groups, config.lr, (first, second), config.eps, config.weight_decay
    )
