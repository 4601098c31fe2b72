"""Random draws as pure functions of keys."""

from __future__ import annotations

import torch

from distrain import rng


def test_bits_agree_with_splitmix64() -> None:
    # The first outputs of the reference implementation for the state 0.
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    got = [value & (2**64 - 1) for value in rng.bits(0, torch.arange(3)).tolist()]
    assert got == expected


def test_key_depends_on_each_part_and_their_order() -> None:
    keys = {rng.key(*parts) for parts in [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1), (-1,), (2**40,)]}
    assert len(keys) == 9
    assert all(-(2**63) <= key < 2**63 for key in keys)


def test_below_is_uniform_and_within_its_limits() -> None:
    drawn = rng.below(9, rng.bits(rng.key(3), torch.arange(90_000)))
    counts = drawn.bincount(minlength=9)
    assert len(counts) == 9
    # Standard deviation 94 of each count around 10,000.
    assert (counts - 10_000).abs().max() < 500
    assert rng.below(1, rng.bits(7, torch.arange(100))).unique().tolist() == [0]


def test_permutation_holds_each_position_once() -> None:
    assert rng.permutation(5, 1000).sort().values.equal(torch.arange(1000))
    assert rng.permutation(5, 0).tolist() == []


def test_words_are_a_fixed_function_of_text_and_count() -> None:
    # Draws of resumed runs depend on these values.
    assert rng.words("7/3/0/weight", 1) == [17155970723543386576]
    assert rng.words("7/3/weight", 2) == [14118079462540539357, 11107178226537733921]
