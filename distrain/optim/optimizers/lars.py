"""LARS: SGD whose step of each tensor is proportional to the tensor's norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from distrain.config.registry import register
from distrain.config.setting import setting
from distrain.optim.optimizers.sgd import SGDConfig
from distrain.optim.optimizers.vectorised import VectorisedOptimizer, norms, or_one
from distrain.optim.uncompiled import without_compiler_hooks
from distrain.torch_internals import foreach


@dataclass
class LarsConfig(SGDConfig):
    """Keys of ``optimizer=lars``."""

    trust_coefficient: float = setting("Length of a tensor's step, as a share of its norm, at lr=1.", above=0)
    eps: float = setting("Added to the norm of the gradient.", at_least=0)
    always_adapt: bool = setting(
        "Scale the gradients of parameters without weight decay too; by default they get SGD's update."
    )


class Lars(VectorisedOptimizer):
    """LARS (You et al. 2017, arXiv 1708.03888, algorithm 1).

    As in timm and apex, the gradient with weight decay is scaled, and momentum is that of SGD; tensors without weight
    decay, which normally are norms and biases, get SGD's update.

    Args:
        params: Parameter groups.
        lr: Learning rate.
        momentum: Decay factor of the momentum buffer.
        nesterov: Whether to use Nesterov's variant of momentum.
        weight_decay: Share of a parameter that is added to its gradient.
        trust_coefficient: Length of a tensor's step, as a share of its norm, at ``lr=1``.
        eps: Added to the norm of the gradient.
        always_adapt: Scale the gradients of parameters without weight decay too.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float,
        nesterov: bool,
        weight_decay: float,
        trust_coefficient: float,
        eps: float,
        always_adapt: bool,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        defaults |= {"trust_coefficient": trust_coefficient, "eps": eps, "always_adapt": always_adapt}
        super().__init__(params, defaults)

    @override
    def _update(self, parameters: list[nn.Parameter], gradients: list[Tensor], group: dict[str, Any]) -> None:
        decay, momentum = group["weight_decay"], group["momentum"]
        if decay or group["always_adapt"]:
            lengths, sizes = norms(gradients), norms(list(parameters))
            ratios = group["trust_coefficient"] * sizes / (lengths + sizes * decay + group["eps"])
            gradients = foreach("add", gradients, list(parameters), alpha=decay)
            foreach("mul_", gradients, or_one(ratios, sizes, lengths))
        if momentum:
            buffers = self._moments(parameters, "momentum_buffer")
            foreach("mul_", buffers, momentum)
            foreach("add_", buffers, gradients)
            gradients = foreach("add", gradients, buffers, alpha=momentum) if group["nesterov"] else buffers
        foreach("add_", parameters, gradients, alpha=-group["lr"])


@register("optimizer", "lars", LarsConfig)
def lars(config: LarsConfig, groups: list[dict[str, Any]], fused: bool | None) -> Lars:
    """LARS; ``fused`` is ignored, since there is one implementation."""
    return without_compiler_hooks(Lars)(  # type: ignore[return-value]
        groups,
        config.lr,
        config.momentum,
        config.nesterov,
        config.weight_decay,
        config.trust_coefficient,
        config.eps,
        config.always_adapt,
    )
