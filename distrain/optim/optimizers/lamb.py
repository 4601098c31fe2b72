"""LAMB: Adam whose update of each tensor is as long as the tensor's norm times the learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from distrain.config.registry import register
from distrain.config.setting import setting
from distrain.optim.optimizers.adam import AdamConfig
from distrain.optim.optimizers.vectorised import VectorisedOptimizer, norms, or_one
from distrain.optim.uncompiled import without_compiler_hooks
from distrain.torch_internals import foreach


@dataclass
class LambConfig(AdamConfig):
    """Keys of ``optimizer=lamb``."""

    always_adapt: bool = setting(
        "Scale the updates of parameters without weight decay too; by default they get Adam's."
    )


class Lamb(VectorisedOptimizer):
    """LAMB (You et al. 2019, arXiv 1904.00962, algorithm 2), with Adam's bias correction.

    As in timm, tensors without weight decay, which normally are norms and biases, get Adam's update. The gradient is
    not clipped here: ``trainer.grad_clip_norm=1`` does what other implementations do by themselves.

    Args:
        params: Parameter groups.
        lr: Learning rate.
        betas: Decay rates of the gradient's first and second moment.
        eps: Added to the square root of the second moment.
        weight_decay: Share of a parameter that is added to its update, before the update is scaled.
        always_adapt: Scale the updates of parameters without weight decay too.
    """

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, always_adapt: bool
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "always_adapt": always_adapt}
        super().__init__(params, defaults)

    @override
    def _update(self, parameters: list[nn.Parameter], gradients: list[Tensor], group: dict[str, Any]) -> None:
        (first, second), decay = group["betas"], group["weight_decay"]
        counts = self._count(parameters)
        means, squares = self._moments(parameters, "exp_avg"), self._moments(parameters, "exp_avg_sq")
        foreach("lerp_", means, gradients, 1 - first)
        foreach("mul_", squares, second)
        foreach("addcmul_", squares, gradients, gradients, value=1 - second)
        scale = foreach("sqrt", foreach("div", squares, [1 - second**count for count in counts]))
        foreach("add_", scale, group["eps"])
        updates = foreach("div", foreach("div", means, [1 - first**count for count in counts]), scale)
        if decay:
            foreach("add_", updates, parameters, alpha=decay)
        if decay or group["always_adapt"]:
            lengths, wanted = norms(updates), norms(list(parameters))
            foreach("mul_", updates, or_one(wanted / lengths, wanted, lengths))
        foreach("add_", parameters, updates, alpha=-group["lr"])


@register("optimizer", "lamb", LambConfig)
def lamb(config: LambConfig, groups: list[dict[str, Any]], fused: bool | None) -> Lamb:
    """LAMB; ``fused`` is ignored, since there is one implementation."""
    first, second = config.betas
    return without_compiler_hooks(Lamb)(  # type: ignore[return-value]
        groups, config.lr, (first, second), config.eps, config.weight_decay, config.always_adapt
    )
