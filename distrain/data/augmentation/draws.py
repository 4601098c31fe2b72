"""Random numbers of augmentations: each is a function of (seed, epoch, sample, what it is for)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distrain import rng

#: Identifies these draws among the uses of random numbers.
_DRAWS = 10
#: The 53 upper of 64 random bits make a float64 in [0, 1).
_DROPPED, _STEP = 11, 2.0**-53


class Draws:
    """The random numbers of some samples in an epoch, on the CPU.

    Args:
        seed: The run's seed.
        epoch: Counted from 0.
        counters: For each sample the number that its draws depend on, int64 [n].
    """

    def __init__(self, seed: int, epoch: int, counters: Tensor) -> None:
        self._seed, self._epoch, self._counters = seed, epoch, counters

    def bits(self, use: int, count: int) -> Tensor:
        """64 random bits, int64 [count, n].

        Args:
            use: Identifies what the numbers are for; other uses have other numbers.
            count: Numbers for each sample.
        """
        families = [rng.key(_DRAWS, self._seed, self._epoch, use, index) for index in range(count)]
        return rng.bits(torch.tensor(families).unsqueeze(1), self._counters)

    def uniform(self, use: int, count: int) -> Tensor:
        """Uniform numbers in [0, 1), float64 [count, n]; see :meth:`bits`."""
        return ((self.bits(use, count) >> _DROPPED) & ((1 << 53) - 1)).double() * _STEP


def between(low: float, high: float, uniform: Tensor) -> Tensor:
    """Uniform numbers in [low, high) from those in [0, 1)."""
    return low + (high - low) * uniform


def index_below(limit: int | Tensor, uniform: Tensor) -> Tensor:
    """Uniform integers in [0, limit), int64, from uniform numbers in [0, 1)."""
    return (uniform * limit).long()


def first_true(allowed: Tensor) -> Tensor:
    """For each column of bool [attempts, n] the first row that is true, int64 [n]; 0 if none is."""
    return allowed.byte().argmax(0)


def normal(uniform: Tensor) -> Tensor:
    """Standard normal numbers, float64 [n], from uniform numbers [2, n] (Box and Muller 1958)."""
    return (-2 * torch.log1p(-uniform[0])).sqrt() * torch.cos(2 * math.pi * uniform[1])
