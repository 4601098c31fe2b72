"""compression=qsgd: levels, the probability of rounding up, and what the draws depend on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distrain.communication.collectives import Communicator
from distrain.compression import base
from distrain.compression.bucket import Bucket
from distrain.compression.qsgd import QSGD, QSGDConfig
from distrain.errors import ConfigError
from tests.runs import compose

SCHEMES = [(bits, norm) for bits in (2, 4, 8) for norm in ("max", "l2")]


def make(bits: int = 4, norm: str = "max", *, group: int = 64, seed: int = 0) -> QSGD:
    return QSGD(QSGDConfig("qsgd", 1, False, group, bits, norm), seed)


def rounded(compressor: QSGD, values: Tensor, name: str = "weight") -> tuple[Tensor, Tensor]:
    """What a message about the values decodes to, and its step sizes."""
    flat, received = values.clone(), torch.zeros_like(values)
    message = compressor.compress(Bucket(flat, {name: flat}))
    compressor.add_decompressed(message, Bucket(received, {name: received}))
    return received, message[0]


@pytest.mark.parametrize(("bits", "norm"), SCHEMES)
def test_the_mean_over_many_draws_is_the_value(bits: int, norm: str) -> None:
    draws = 20_000
    values = torch.randn(64, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    received, steps = rounded(make(bits, norm), values.repeat(draws))
    step = float(steps[0])
    mean = received.view(draws, 64).mean(0)
    # Rounding up with probability p has variance p (1 - p) step², at most a quarter of step²; six standard deviations
    # of the mean leave one of the 384 means of this test outside in a run in a million.
    up = values / step - (values / step).floor()
    deviation = step * (up * (1 - up) / draws).sqrt()
    assert ((mean - values).abs() <= 6 * deviation + step * 2**-16).all()
    assert (received.view(draws, 64).var(0) - step**2 * up * (1 - up)).abs().max() < 0.05 * step**2


@pytest.mark.parametrize(("bits", "norm"), SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_error_is_below_one_step(bits: int, norm: str, dtype: torch.dtype) -> None:
    values = torch.randn(64 * 500 + 13, generator=torch.Generator().manual_seed(1), dtype=dtype)
    received, steps = rounded(make(bits, norm), values)
    each = steps.repeat_interleave(64)[: len(values)]
    assert ((received - values).abs() < each * (1 + 1e-5)).all()
    levels = received / each
    assert (levels - levels.round()).abs().max() < 1e-4
    assert levels.abs().max() <= 2 ** (bits - 1) - 1 + 1e-4


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_that_are_levels_are_exact(bits: int) -> None:
    highest = 2 ** (bits - 1) - 1
    levels = torch.arange(-highest, highest + 1).repeat(1000).float()
    received, _ = rounded(make(bits, group=len(levels)), levels)
    assert torch.equal(received, levels)


def test_probability_of_rounding_up_has_16_bits() -> None:
    values = torch.full((2**20,), 2.0**-12)
    values[0] = 1
    received, steps = rounded(make(2, group=len(values)), values)
    assert steps.tolist() == [1.0]
    expected = len(values) * 2.0**-12
    assert abs(float(received.sum()) - 1 - expected) < 6 * math.sqrt(expected)


def test_rounding_is_symmetric_around_zero() -> None:
    for value in (2.0**-20, -(2.0**-20)):
        values = torch.full((2**20,), value)
        values[0] = 1
        received, _ = rounded(make(2, group=len(values)), values)
        assert received.count_nonzero() == 1


def test_quotients_above_the_highest_level_are_clamped() -> None:
    values = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    above = values[values / (values / 127) > 127]
    assert len(above) > 10
    values = above.repeat(2**20 // len(above))
    received, _ = rounded(make(8, group=1), values)
    torch.testing.assert_close(received, values)


def test_max_norm_has_smaller_error_than_l2() -> None:
    values = torch.randn(51200, generator=torch.Generator().manual_seed(0))
    errors = {norm: float((rounded(make(4, norm, group=512), values)[0] - values).norm()) for norm in ("max", "l2")}
    assert errors["max"] < 0.5 * errors["l2"]


def test_draws_depend_on_step_rank_seed_and_bucket_alone() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    first = rounded(make(), values)[0]
    assert torch.equal(rounded(make(), values)[0], first)
    later, elsewhere = make(), make()
    later.begin_step()
    elsewhere.rank = 1
    others = [rounded(later, values), rounded(elsewhere, values), rounded(make(seed=1), values)]
    others.append(rounded(make(), values, name="other"))
    found = [first, *(received for received, _ in others)]
    assert len({tuple(each.tolist()) for each in found}) == len(found)


def test_errors_of_two_ranks_are_independent() -> None:
    values = torch.randn(64_000, generator=torch.Generator().manual_seed(0))
    here, there = make(2), make(2)
    there.rank = 1
    errors = torch.stack([rounded(compressor, values)[0] - values for compressor in (here, there)])
    assert abs(float(torch.corrcoef(errors)[0, 1])) < 6 / math.sqrt(values.numel())


def test_draws_are_made_for_the_communicator_s_rank() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    alone = Communicator()
    alone.rank = 3
    flat = values.clone()
    for pending in make().aggregate(Bucket(flat, {"weight": flat}), alone):
        pending.wait()
    direct = make()
    direct.rank = 3
    assert torch.equal(flat, rounded(direct, values)[0])


@pytest.mark.parametrize(("bits", "ratio"), [(8, 4), (4, 8), (2, 16)])
def test_message_size_matches_the_number_of_bits(bits: int, ratio: int) -> None:
    compressor = base.build(compose("compression=qsgd", f"compression.bits={bits}").compression)
    assert isinstance(compressor, QSGD)
    flat = torch.randn(1_000_000)
    bucket = Bucket(flat, {"weight": flat})
    assert 0.95 * ratio < bucket.bytes / compressor.encode(bucket).numel() < ratio
    assert compressor.residuals is None


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("compression.bits=3", "compression.bits=3: unknown choice; choices: 2, 4, 8"),
        ("compression.norm=l1", "compression.norm=l1: unknown choice; choices: max, l2"),
        ("compression.bucket_size=0", "compression.bucket_size=0: must be at least 1"),
    ],
)
def test_unsupported_bits_and_norms_are_refused(override: str, line: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compose("compression=qsgd", override)
    assert str(refused.value).startswith(line)
