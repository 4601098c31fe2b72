"""Number formats: what is computed in which, and the loss scaling that fp16 needs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distrain.carried import Carried

if TYPE_CHECKING:
    from distrain.strategies.gradients import Scalable

_MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """One of fp32, fp64 (all in that format), bf16 and fp16 (parameters in float32, heavy operations in 16 bits).

    fp16 scales the loss so that small gradients don't vanish (Micikevicius et al. 2018, arXiv 1710.03740, §3.2): the
    scale halves, and the update is left out, whenever a gradient overflows, and doubles after 2,000 good steps. The
    gradients are the reduced ones, equal on all replicas, so all decide alike without talking.
    """

    growth_interval = 2000

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self._device = device.type
        #: Format of parameters and of the images given to the model.
        self.dtype = torch.float64 if name == "fp64" else torch.float32
        self._scale = 2.0**16 if name == "fp16" else 1.0
        self._good_steps = 0

    def autocast(self) -> AbstractContextManager[Any]:
        """What forward passes run in."""
        if self.name in _MIXED:
            return torch.autocast(self._device, _MIXED[self.name])
        return nullcontext()

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to call ``backward()`` on."""
        return loss * self._scale if self.name == "fp16" else loss

    def unscale(self, gradients: Scalable) -> bool:
        """Takes the scale out of the gradients.

        Returns:
            Whether one of them overflowed; asking makes the host wait for the device, so only fp16 does.
        """
        if self.name != "fp16":
            return False
        gradients.scale(torch.tensor(1.0 / self._scale, device=self._device))
        return not bool(gradients.norm().isfinite())

    def step(self, optimizer: torch.optim.Optimizer, overflowed: bool) -> None:
        """Updates the parameters, unless a gradient overflowed."""
        if not overflowed:
            optimizer.step()
        if self.name == "fp16":
            self._good_steps = 0 if overflowed else self._good_steps + 1
            if overflowed:
                self._scale = max(self._scale / 2, 1.0)
            elif self._good_steps == self.growth_interval:
                self._scale, self._good_steps = self._scale * 2, 0

    def state_dict(self) -> dict[str, float]:
        """The loss scale and how long it has held; empty where losses aren't scaled."""
        return {"scale": self._scale, "good_steps": self._good_steps} if self.name == "fp16" else {}

    def load_state_dict(self, saved: Mapping[str, float]) -> Carried:
        """Takes back what :meth:`state_dict` gave; what another precision gave is left out."""
        part = "loss scale"
        if self.name != "fp16":
            return Carried(part, "absent", f"{self.name} scales no loss")
        if not saved:
            return Carried(part, "reset", f"the saved run had none; it begins at {self._scale:g}")
        self._scale, self._good_steps = float(saved["scale"]), int(saved["good_steps"])
        return Carried(part, "exact", f"{self._scale:g} for {self._good_steps} steps")
