"""A few bits an element, rounded at random so that the mean is right."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from distrain.communication.collectives import Communicator, Pending
from distrain.compression.bucket import Bucket
from distrain.compression.quantised import Quantised, QuantisedConfig
from distrain.config.registry import register
from distrain.config.schema import setting


@dataclass
class QSGDConfig(QuantisedConfig):
    """Keys of ``compression=qsgd``."""

    bits: int = setting("Bits an element takes, its sign included.", choices=(2, 4, 8))
    norm: str = setting(
        "A group's scale: max is its largest magnitude, l2 its Euclidean norm (coarser).", choices=("max", "l2")
    )


@register("compression", "qsgd", QSGDConfig)
class QSGD(Quantised):
    """Rounds each element up or down to one of ``2**bits - 1`` levels, so that it is right in expectation.

    Alistarh et al. 2017, "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding" (arXiv 1610.02132),
    §3.1 for the rounding, §4 for groups (its "buckets") and the scale by the largest magnitude. Levels take the same
    number of bits each; the paper's Elias code pays only where most levels are zero.

    The draws have 16 bits, so the probability of rounding up is right to 2**-17. They depend on the seed, the step, the
    rank and the bucket's first parameter: ranks draw independently, and nothing has to be kept for a resumed run.

    Attributes:
        rank: Which rank's draws to make; the communicator's, once there was one.
    """

    config: QSGDConfig

    def __init__(self, config: QSGDConfig, seed: int = 0) -> None:
        super().__init__(config, seed)
        self.bits = config.bits
        self.lowest = 1 - 2 ** (config.bits - 1)
        self.rank = 0
        self._generator = torch.Generator()

    def aggregate(self, bucket: Bucket, communicator: Communicator) -> Iterator[Pending]:
        """Remembers the rank; see the base class."""
        self.rank = communicator.rank
        return super().aggregate(bucket, communicator)

    def compress(self, owed: Bucket) -> list[Tensor]:
        """Begins this step's draws for the bucket; see the base class."""
        key = f"{self.seed}/{self.step}/{self.rank}/{next(iter(owed.tensors), '')}"
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        self._generator = torch.Generator(owed.flat.device).manual_seed(int.from_bytes(digest, "little"))
        return super().compress(owed)

    def quantise(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The scale of each group by its highest level, and each value in these steps, rounded at random."""
        if self.config.norm == "max":
            scale = values.abs().amax(-1, keepdim=True)
        else:
            scale = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
        highest = -self.lowest
        # Not zero, where all values are, nor so small that a quotient is not finite.
        step = (scale / highest).float().clamp_min_(torch.finfo(torch.float32).tiny)
        # A draw d is one of -2**15 … 2**15 - 1; (d + 2**15 + 1/2) / 2**16 is uniform and symmetric between 0 and 1, so
        # that a value that is a level already stays. Four are cut out of each 64 random bits, which is five times as
        # fast as drawing floats.
        words = torch.empty(-(-values.numel() // 4), dtype=torch.int64, device=values.device)
        words.random_(-(2**63), None, generator=self._generator)
        draws = words.view(torch.int16)[: values.numel()].view_as(values).to(values.dtype)
        levels = (values / step.to(values.dtype)).add_(0.5 + 2**-17).add_(draws, alpha=2**-16).floor_()
        # The largest quotient may be rounded to more than the highest level.
        return step, levels.clamp_(self.lowest, highest)
