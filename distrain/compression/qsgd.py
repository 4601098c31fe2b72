"""A few bits per element, rounded at random so that the expected value is exact."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from distrain import rng
from distrain.communication.collectives import Communicator
from distrain.communication.types import Pending
from distrain.compression.bucket import Bucket
from distrain.compression.quantised import Quantised, QuantisedConfig
from distrain.config.registry import register
from distrain.config.setting import setting


@dataclass
class QSGDConfig(QuantisedConfig):
    """Keys of ``compression=qsgd``."""

    bits: int = setting("Bits per element, including its sign.", choices=(2, 4, 8))
    norm: str = setting(
        "A group's scale: max is its largest magnitude, l2 its Euclidean norm (coarser).", choices=("max", "l2")
    )


@register("compression", "qsgd", QSGDConfig)
class QSGD(Quantised):
    """Rounds each element up or down at random to one of ``2**bits - 1`` levels; its expected value is the element.

    Alistarh et al. 2017, "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding" (arXiv 1610.02132),
    §3.1 for the rounding, §4 for groups (its "buckets") and the scale by the largest magnitude. All levels take the
    same number of bits; the paper's Elias code pays only where most levels are zero.

    The draws have 16 bits, so the probability of rounding up is exact to 2**-17. They depend on the seed, the step, the
    rank and the bucket's first parameter: ranks draw independently, and a resumed run needs no generator state.

    Attributes:
        rank: Rank that the draws are made for: the communicator's once there has been one, else 0.
    """

    config: QSGDConfig

    def __init__(self, config: QSGDConfig, seed: int = 0) -> None:
        super().__init__(config, seed)
        self.bits = config.bits
        self.lowest = 1 - 2 ** (config.bits - 1)
        self.rank = 0
        self._generator = torch.Generator()

    @override
    def aggregate(self, bucket: Bucket, communicator: Communicator) -> Iterator[Pending]:
        self.rank = communicator.rank
        return super().aggregate(bucket, communicator)

    @override
    def compress(self, bucket: Bucket) -> list[Tensor]:
        (draw_seed,) = rng.words(f"{self.seed}/{self.step}/{self.rank}/{next(iter(bucket.tensors), '')}", 1)
        self._generator = torch.Generator(bucket.flat.device).manual_seed(draw_seed)
        return super().compress(bucket)

    @override
    def quantise(self, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.norm == "max":
            scale = values.abs().amax(-1, keepdim=True)
        else:
            scale = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
        highest = -self.lowest
        # The lower limit keeps quotients finite where all values are zero or tiny.
        step = (scale / highest).float().clamp_min_(torch.finfo(torch.float32).tiny)
        # A draw d is an integer from -2**15 to 2**15 - 1, so (d + 2**15 + 1/2) / 2**16 is uniform and symmetric between
        # 0 and 1, exclusive: a value that already is a level stays. Each 64 random bits give four draws, which is five
        # times as fast as drawing floats.
        random_words = torch.empty(-(-values.numel() // 4), dtype=torch.int64, device=values.device)
        random_words.random_(-(2**63), None, generator=self._generator)
        draws = random_words.view(torch.int16)[: values.numel()].view_as(values).to(values.dtype)
        levels = (values / step.to(values.dtype)).add_(0.5 + 2**-17).add_(draws, alpha=2**-16).floor_()
        # Rounding can make the largest quotient exceed the highest level.
        return step, levels.clamp_(self.lowest, highest)
