"""Gradients as bfloat16."""

from __future__ import annotations

import torch

from distrain.compression.casts import Cast
from distrain.config.registry import register
from distrain.config.schema import CompressionConfig


@register("compression", "bf16", CompressionConfig)
class BF16(Cast):
    """8 significant bits, a relative error of at most 2⁻⁸ (0.4 %) each time a number is rounded.

    The range is float32's, so that small gradients don't vanish and large ones don't become infinite. Kalamkar et al.
    2019, "A Study of BFLOAT16 for Deep Learning Training" (arXiv 1905.12322), §3.
    """

    dtype = torch.bfloat16
