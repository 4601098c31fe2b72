"""Base class of top-k and random-k: how many elements of each tensor are sent, and removing them from the residual."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from distrain import rng
from distrain.compression.base import LossyConfig, MessageCompressor
from distrain.compression.bucket import Bucket
from distrain.compression.error_feedback import Residuals
from distrain.config.schema import Config
from distrain.config.setting import setting
from distrain.errors import ConfigError

#: Share of the elements that the first step of a warm-up sends (Lin et al. 2018, §3.3).
_INITIAL_DENSITY = 0.25


@dataclass
class SparseConfig(LossyConfig):
    """Keys of compressors that send a few elements of each tensor."""

    density: float = setting("Share of a tensor's elements that is sent per step.", above=0, at_most=1)
    warmup_steps: int = setting(
        "Number of steps in which the share falls exponentially from 0.25 to `density`; 0: none.", at_least=0
    )
    momentum_correction: float = setting(
        "Momentum applied before elements are chosen, instead of the optimizer's; 0: none.", at_least=0, below=1
    )

    def __post_init__(self) -> None:
        """Refuses momentum correction without error feedback, which it works on.

        Raises:
            ConfigError: ``momentum_correction`` is set and ``error_feedback`` is not.
        """
        if self.momentum_correction and not self.error_feedback:
            raise ConfigError(
                "compression.momentum_correction", self.momentum_correction, "needs compression.error_feedback=true"
            )


class SparseCompressor(MessageCompressor):
    """Sends the same number of elements of each tensor on every rank: ``density`` of them, rounded up.

    Warm-up and momentum correction follow Lin et al. 2018, "Deep Gradient Compression" (arXiv 1712.01887), §3.3 and
    §3.1.
    """

    config: SparseConfig

    def __init__(self, config: SparseConfig, seed: int = 0) -> None:
        super().__init__(config, seed)
        self.warmup_steps = config.warmup_steps
        if self.residuals is not None:
            self.residuals = Residuals(config.momentum_correction)

    @classmethod
    @override
    def check(cls, config: Config) -> None:
        super().check(config)
        correction = getattr(config.compression, "momentum_correction", 0)
        momentum = getattr(config.optimizer, "momentum", 0)
        if correction and momentum:
            raise ConfigError(
                "compression.momentum_correction", correction, f"takes the place of optimizer.momentum={momentum:g}"
            )

    def density(self, step: int) -> float:
        """The share of elements that a step sends; the first step is 1."""
        steps_before, density = step - 1, self.config.density
        if steps_before >= self.config.warmup_steps or density >= _INITIAL_DENSITY:
            return density
        return float(_INITIAL_DENSITY * (density / _INITIAL_DENSITY) ** (steps_before / self.config.warmup_steps))

    def counts(self, bucket: Bucket, step: int) -> dict[str, int]:
        """How many elements of each tensor a step sends."""
        density = self.density(step)
        return {name: max(1, math.ceil(density * tensor.numel())) for name, tensor in bucket.compressed_tensors.items()}

    def draw_key(self, step: int, name: str) -> str:
        """What the random draws for a tensor in a step depend on."""
        return f"{self.seed}/{step}/{name}"

    def extract(self, bucket: Bucket, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """Removes elements from what is to be sent and, with momentum correction, clears their velocity.

        Args:
            bucket: What is to be sent; zero remains at the positions, or the error of rounding to ``dtype``.
            positions: int64 indices into the compressed part.
            dtype: Dtype to send the elements in.

        Returns:
            The elements in the order of their positions.
        """
        elements = bucket.compressed_part
        values = elements.index_select(0, positions)
        sent = values.to(dtype)
        if sent is values:
            elements.index_fill_(0, positions, 0)
        else:
            # Non-finite values leave no residual: it would make every later sum NaN.
            rounding_error = values.sub_(sent).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
            elements.index_copy_(0, positions, rounding_error)
        if self.residuals is not None:
            self.residuals.clear_velocity(bucket, positions)
        return sent


def positions_in_bucket(bucket: Bucket, positions: Mapping[str, Tensor]) -> Tensor:
    """Converts positions within tensors to positions within the bucket's compressed part.

    Args:
        bucket: The bucket that holds the tensors.
        positions: For each compressed tensor, int64 positions in it.

    Returns:
        int64 on the bucket's device, one tensor after the other.
    """
    parts, offset = [torch.empty(0, dtype=torch.int64)], 0
    for name, tensor in bucket.compressed_tensors.items():
        parts.append(positions[name] + offset)
        offset += tensor.numel()
    # Concatenated before the transfer to the device, so that there is one per bucket. The empty first part is for
    # buckets without compressed tensors.
    return torch.cat(parts[1:] or parts).to(bucket.flat.device)


def stratified_sample(size: int, count: int, key: str) -> Tensor:
    """Draws distinct positions at random: one from each of ``count`` nearly equal intervals of ``size`` positions.

    The intervals start at a random offset, so every position has the same probability. The time grows with ``count``;
    that of a random permutation grows with ``size``.

    Args:
        size: Upper limit of positions, exclusive.
        count: Number of positions, from 1 to ``size``.
        key: Determines the draw, on every device.

    Returns:
        int64 ``[count]`` on the CPU, in no particular order.
    """
    draw_seed, random_offset = rng.words(key, 2)
    # Always drawn on the CPU: a GPU's draws may depend on its model.
    generator = torch.Generator().manual_seed(draw_seed)
    length, longer = divmod(size, count)
    draws = torch.rand(count, generator=generator, dtype=torch.float64)
    draws[:longer] *= length + 1
    draws[longer:] *= length
    index = torch.arange(count)
    positions = draws.to(torch.int64).add_(index, alpha=length).add_(index.clamp_(max=longer))
    positions += random_offset % size
    return torch.where(positions < size, positions, positions - size)
