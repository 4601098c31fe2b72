"""Number formats of a training step, and the loss scaling that fp16 needs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distrain.checkpoint.restore_report import RestoredPart

if TYPE_CHECKING:
    from distrain.gradients.clip import ScalableGradients

_MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """One of fp32, fp64 (all in that format), bf16 and fp16 (parameters in float32, heavy operations in 16 bits).

    fp16 scales the loss so that small gradients don't vanish (Micikevicius et al. 2018, arXiv 1710.03740, §3.2): the
    scale halves, and the update is skipped, whenever a gradient overflows, and doubles after 2,000 good steps. The
    gradients are the reduced ones, equal on all replicas, so all replicas decide alike without communicating.

    Args:
        name: A choice of ``trainer.precision`` other than ``auto``.
        device: Where the model is.
        check_gradients: Compute the norm of every gradient, and skip the update if it is not finite.

    Attributes:
        dtype: Format of parameters and of the model's inputs.
        checks_gradients: Whether :meth:`step` needs the gradient's norm. The host then waits for the device, so this is
            so for fp16 and on request only.
        rescaled: Whether the last update was skipped for a gradient that a smaller loss scale may mend.
    """

    growth_interval = 2000

    def __init__(self, name: str, device: torch.device, *, check_gradients: bool = False) -> None:
        self.name = name
        self._device = device.type
        self.checks_gradients = check_gradients or name == "fp16"
        self.rescaled = False
        self._marks_loss = check_gradients
        self.dtype = torch.float64 if name == "fp64" else torch.float32
        self._scale = 2.0**16 if name == "fp16" else 1.0
        self._good_steps = 0

    @property
    def is_mixed(self) -> bool:
        """Whether heavy operations are in another format than parameters."""
        return self.name in _MIXED

    def autocast(self) -> AbstractContextManager[Any]:
        """The context that forward passes run in."""
        if self.is_mixed:
            return torch.autocast(self._device, _MIXED[self.name])
        return nullcontext()

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to call ``backward()`` on, multiplied by the loss scale."""
        if self._marks_loss:
            # Multiplies by 1, or by NaN: then a loss that is not finite makes the gradient NaN, always.
            loss = loss * ((loss - loss).detach() + 1)
        return loss * self._scale if self.name == "fp16" else loss

    def unscale(self, gradients: ScalableGradients) -> None:
        """Divides the gradients by the loss scale."""
        if self.name == "fp16":
            gradients.scale(torch.tensor(1.0 / self._scale, device=self._device))

    def step(self, optimizer: torch.optim.Optimizer, norm: Tensor | None) -> bool:
        """Updates the parameters, unless the gradient is not finite.

        Args:
            optimizer: Of the parameters.
            norm: The gradient's norm, a scalar; needed where :attr:`checks_gradients` is set.

        Returns:
            Whether they were updated.
        """
        overflowed = self.checks_gradients and norm is not None and not bool(norm.isfinite())
        if not overflowed:
            optimizer.step()
        self.rescaled = overflowed and self._scale > 1
        if self.name == "fp16":
            self._good_steps = 0 if overflowed else self._good_steps + 1
            if overflowed:
                self._scale = max(self._scale / 2, 1.0)
            elif self._good_steps == self.growth_interval:
                self._scale, self._good_steps = self._scale * 2, 0
        return not overflowed

    def state_dict(self) -> dict[str, float]:
        """The loss scale and how long it has held; empty where losses aren't scaled."""
        return {"scale": self._scale, "good_steps": self._good_steps} if self.name == "fp16" else {}

    def load_state_dict(self, saved: Mapping[str, float]) -> RestoredPart:
        """Restores the loss scale; the state of another precision is ignored."""
        part = "loss scale"
        if self.name != "fp16":
            return RestoredPart(part, "absent", f"{self.name} scales no loss")
        if not saved:
            return RestoredPart(part, "reset", f"the saved run had none; it begins at {self._scale:g}")
        self._scale, self._good_steps = float(saved["scale"]), int(saved["good_steps"])
        return RestoredPart(part, "exact", f"{self._scale:g} for {self._good_steps} steps")
