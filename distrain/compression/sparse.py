"""What top-k and random-k share: how many elements of each tensor are sent, and taking them out of what is owed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distrain.compression.base import Compressor, LossyConfig
from distrain.compression.bucket import Bucket
from distrain.compression.error_feedback import Residuals
from distrain.config.schema import Config, setting
from distrain.errors import ConfigError

#: Share of the elements that the first step of a warm-up sends (Lin et al. 2018, §3.3).
_WARMUP_DENSITY = 0.25


@dataclass
class SparseConfig(LossyConfig):
    """Keys of compressors that send a few elements of each tensor."""

    density: float = setting("Share of a tensor's elements that is sent in a step.", above=0, at_most=1)
    warmup_steps: int = setting(
        "The share falls exponentially from 0.25 to `density` over so many steps; 0: none.", at_least=0
    )
    momentum_correction: float = setting(
        "Momentum taken before the choice, in place of the optimizer's; 0: none.", at_least=0, below=1
    )

    def __post_init__(self) -> None:
        """Refuses momentum correction without the memory that it works on.

        Raises:
            ConfigError: ``momentum_correction`` is set and ``error_feedback`` is not.
        """
        if self.momentum_correction and not self.error_feedback:
            raise ConfigError(
                "compression.momentum_correction", self.momentum_correction, "needs compression.error_feedback=true"
            )


class SparseCompressor(Compressor):
    """Sends the same number of elements of each tensor on every rank: ``density`` of them, rounded up.

    Warm-up and momentum correction are those of Lin et al. 2018, "Deep Gradient Compression" (arXiv 1712.01887), §3.3
    and §3.1.
    """

    config: SparseConfig

    def __init__(self, config: SparseConfig, seed: int = 0) -> None:
        super().__init__(config, seed)
        self.warmup_steps = config.warmup_steps
        if self.residuals is not None:
            self.residuals = Residuals(config.momentum_correction)

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuses momentum twice; see the base class."""
        super().check(config)
        assert isinstance(config.compression, SparseConfig)
        corrected, momentum = config.compression.momentum_correction, getattr(config.optimizer, "momentum", 0)
        if corrected and momentum:
            raise ConfigError(
                "compression.momentum_correction", corrected, f"takes the place of optimizer.momentum={momentum:g}"
            )

    def density(self, step: int) -> float:
        """The share of elements that is sent in a step; the first step is 1."""
        done, wanted = step - 1, self.config.density
        if done >= self.config.warmup_steps or wanted >= _WARMUP_DENSITY:
            return wanted
        return float(_WARMUP_DENSITY * (wanted / _WARMUP_DENSITY) ** (done / self.config.warmup_steps))

    def counts(self, bucket: Bucket, step: int) -> dict[str, int]:
        """How many elements of each tensor are sent in a step."""
        density = self.density(step)
        return {name: max(1, math.ceil(density * tensor.numel())) for name, tensor in bucket.compressed_tensors.items()}

    def key(self, step: int, name: str) -> str:
        """What the random choices about a tensor in a step depend on."""
        return f"{self.seed}/{step}/{name}"

    def take_at(self, owed: Bucket, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """Takes elements out of what is owed and, with momentum correction, clears their velocity.

        Args:
            owed: Left with zeros there, or with what ``dtype`` rounds off.
            positions: int64 indices into the lossy part, tensor after tensor.
            dtype: Of what is sent.

        Returns:
            The elements in the order of their positions.
        """
        lossy = owed.compressed_part
        values = lossy.index_select(0, positions)
        sent = values.to(dtype)
        if sent is values:
            lossy.index_fill_(0, positions, 0)
        else:
            # What isn't finite is sent and gone; kept, it would make every later sum NaN.
            rounded_off = values.sub_(sent).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
            lossy.index_copy_(0, positions, rounded_off)
        if self.residuals is not None:
            self.residuals.forget(owed, positions)
        return sent


def joined(bucket: Bucket, chosen: Mapping[str, Tensor]) -> Tensor:
    """Positions in each tensor as positions in the bucket's lossy part, tensor after tensor.

    Args:
        bucket: Whose lossy tensors they are.
        chosen: For each tensor int64 positions.
    """
    parts, offset = [torch.empty(0, dtype=torch.int64)], 0
    for name, tensor in bucket.compressed_tensors.items():
        parts.append(chosen[name] + offset)
        offset += tensor.numel()
    # Together, where they were chosen elsewhere: one transfer a bucket. An empty bucket has nothing but the first part.
    return torch.cat(parts[1:] or parts).to(bucket.flat.device)


def stratified(size: int, count: int, key: str) -> Tensor:
    """Different positions drawn at random: one from each of ``count`` near-equal stretches of ``size`` positions.

    The stretches begin at a random place, so that every position is drawn with the same probability. This takes time
    for ``count`` numbers only, where a permutation takes it for ``size``.

    Args:
        size: Positions are below this.
        count: How many, at least 1 and at most ``size``.
        key: Fixes the draw, on any device.

    Returns:
        int64 ``[count]`` on the CPU, in no particular order.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    # Always on the CPU: what a GPU draws may depend on its model.
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    length, longer = divmod(size, count)
    draws = torch.rand(count, generator=generator, dtype=torch.float64)
    draws[:longer] *= length + 1
    draws[longer:] *= length
    index = torch.arange(count)
    positions = draws.to(torch.int64).add_(index, alpha=length).add_(index.clamp_(max=longer))
    positions += int.from_bytes(digest[8:], "little") % size
    return torch.where(positions < size, positions, positions - size)
