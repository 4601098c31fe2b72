"""One bit per element."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from distrain.compression.quantised import Quantised, QuantisedConfig
from distrain.config.registry import register


@register("compression", "signsgd", QuantisedConfig)
class SignSGD(Quantised):
    """Sends the sign of each element and, per group, the mean magnitude by which the signs are scaled.

    Karimireddy et al. 2019, "Error Feedback Fixes SignSGD and other Gradient Compression Schemes" (arXiv 1901.09847),
    algorithm 1, with a scale per group of ``bucket_size`` elements instead of one per layer. Related: signs without
    scale or error feedback, Bernstein et al. 2018, "signSGD" (arXiv 1802.04434); one bit with error feedback, Seide et
    al. 2014, "1-bit stochastic gradient descent". The ranks' messages are summed; there is no majority vote.
    """

    bits = 1
    lowest = -1
    shift = 1

    @override
    def quantise(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The mean magnitude of each group, and 1 or -1 for each value; a zero counts by its sign bit."""
        step = values.abs().mean(-1, keepdim=True).float()
        return step, torch.copysign(torch.ones((), dtype=values.dtype, device=values.device), values)
