"""Gradients as IEEE half precision."""

from __future__ import annotations

import torch

from distrain.compression.casts import Cast
from distrain.config.groups import CompressionConfig
from distrain.config.registry import register


@register("compression", "fp16", CompressionConfig)
class FP16(Cast):
    """Casts to 11 significant bits: each rounding has a relative error of at most 2⁻¹¹ (4.9e-4).

    Magnitudes below 6.1e-5 keep fewer bits, and those below 3e-8 become zero. Magnitudes above 65,504 become infinite
    and are not clamped: the optimizer sees an infinite gradient, and with ``trainer.precision=fp16`` loss scaling skips
    that step, which it could not do if the number were clamped. Each rank's gradient is divided by the global batch
    size before it is sent, so the sum overflows only where the mean gradient, times the loss scale, does.
    """

    dtype = torch.float16
