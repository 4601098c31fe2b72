"""Gradients as IEEE half precision."""

from __future__ import annotations

import torch

from distrain.compression.casts import Cast
from distrain.config.registry import register
from distrain.config.schema import CompressionConfig


@register("compression", "fp16", CompressionConfig)
class FP16(Cast):
    """11 significant bits, a relative error of at most 2⁻¹¹ (4.9e-4) each time a number is rounded.

    Below 6.1e-5 fewer bits are left, and below 3e-8 the result is zero. Above 65,504 it is infinite, and stays so: the
    optimizer sees an infinite gradient, and with ``trainer.precision=fp16`` loss scaling skips that step, which it
    could not if the number were cut off. Each rank's share is divided by the global batch's size before it travels, so
    the sum overflows only where the mean gradient, times the loss scale, does.
    """

    dtype = torch.float16
