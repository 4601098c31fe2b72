"""Gradients as bfloat16."""

from __future__ import annotations

import torch

from distrain.compression.casts import Cast
from distrain.config.groups import CompressionConfig
from distrain.config.registry import register


@register("compression", "bf16", CompressionConfig)
class BF16(Cast):
    """Casts to 8 significant bits: each rounding has a relative error of at most 2⁻⁸ (0.4 %).

    The range is float32's, so small gradients do not become zero and large ones do not become infinite. Kalamkar et al.
    2019, "A Study of BFLOAT16 for Deep Learning Training" (arXiv 1905.12322), §3.
    """

    dtype = torch.bfloat16
