"""Random draws as pure functions of what they are for, instead of a generator with a state.

A draw that depends on (seed, epoch, sample index) alone is the same on every rank, for any number of ranks, in any
order of evaluation, after any resume, on CPU and on CUDA. :func:`bits` is a counter-based hash: the finaliser of
splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014), in integers that wrap at 64
bits. :func:`words` hashes text, as seeds of generators.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
# The constants of splitmix64: the increment, and the multipliers of its two mixing rounds.
_INCREMENT = 0x9E3779B97F4A7C15
_FIRST_MULTIPLIER = 0xBF58476D1CE4E5B9
_SECOND_MULTIPLIER = 0x94D049BB133111EB


def key(*parts: int) -> int:
    """A 64-bit key (as a signed integer) for a family of draws, from the integers that identify it, in their order."""
    state = 0
    for part in parts:
        state = (state + (part & _MASK) + _INCREMENT) & _MASK
        state = ((state ^ (state >> 30)) * _FIRST_MULTIPLIER) & _MASK
        state = ((state ^ (state >> 27)) * _SECOND_MULTIPLIER) & _MASK
        state ^= state >> 31
    return _signed(state)


def words(text: str, count: int) -> list[int]:
    """``count`` unsigned 64-bit integers, at most 8: the BLAKE2b digest of a text, of ``8 * count`` bytes.

    Texts that differ give unrelated integers, and so do counts that differ.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8 * count).digest()
    return [int.from_bytes(digest[start : start + 8], "little") for start in range(0, len(digest), 8)]


def bits(family: int | Tensor, counters: Tensor) -> Tensor:
    """64 random bits for each counter.

    Args:
        family: From :func:`key`; or several, an int64 tensor whose shape can be combined with that of the counters.
        counters: int64, any shape, any device.

    Returns:
        int64 of the same shape, or that of both combined. All 64 bits are random, so half of the values are negative.
    """
    state = (counters + 1) * _signed(_INCREMENT) + family
    state = (state ^ _shift(state, 30)) * _signed(_FIRST_MULTIPLIER)
    state = (state ^ _shift(state, 27)) * _signed(_SECOND_MULTIPLIER)
    return state ^ _shift(state, 31)


def below(limit: int, random_bits: Tensor) -> Tensor:
    """Uniform integers in ``[0, limit)`` from the upper 31 of 64 random bits; ``limit`` is at most 2**31."""
    return (_shift(random_bits, 33) * limit) >> 31


def permutation(family: int, count: int) -> Tensor:
    """A random permutation of ``count`` positions, int64 ``[count]``: the positions sorted by their random bits."""
    return torch.argsort(bits(family, torch.arange(count)), stable=True)


def _shift(values: Tensor, places: int) -> Tensor:
    # torch shifts signed integers arithmetically; the mask clears the copies of the sign.
    return (values >> places) & ((1 << (64 - places)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def step_seed(seed: int, step: int, shard: int) -> int:
    """A seed for what one shard of a batch draws in one step, in dropout for example."""
    return ((seed * 1_000_003 + step) * 65_537 + shard) % 2**63
