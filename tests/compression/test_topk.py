"""compression=topk: the largest elements of each tensor are sent with their positions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distrain.compression import topk
from distrain.compression.topk import TopK, largest
from tests.compression.simulated_ranks import SimulatedRanks, bucket_for, make_compressor

SAMPLED, EXACT = 1, 10**9


def reference(tensor: Tensor, count: int) -> Tensor:
    return tensor.abs().argsort(descending=True)[:count].sort().values


# --- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample_above", [SAMPLED, EXACT])
@pytest.mark.parametrize("density", [0.0001, 0.01, 0.05, 0.5, 0.99, 1])
@pytest.mark.parametrize("size", [1, 7, 30_011])
def test_largest_elements_are_chosen_in_ascending_order(size: int, density: float, sample_above: int) -> None:
    count = max(1, math.ceil(density * size))
    # Heavy tails, as gradients have, and no two magnitudes equal.
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    assert torch.equal(largest(tensor, count, sample_above, "key"), reference(tensor, count))


@pytest.mark.parametrize("count", [30, 3_000, 12_000])
def test_sampled_threshold_leaves_few_candidates_but_enough(count: int) -> None:
    magnitudes = torch.rand(30_000, generator=torch.Generator().manual_seed(0))
    for number in range(20):
        candidates = topk._candidates(magnitudes, count, str(number))
        assert count <= len(candidates) < max(3 * count, 1_000)


def test_too_few_candidates_still_give_the_exact_result(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.arange(1000.0)
    monkeypatch.setattr(topk, "_candidates", lambda magnitudes, count, key: torch.tensor([999]))
    assert largest(tensor, 10, SAMPLED, "key").tolist() == list(range(990, 1000))


@pytest.mark.parametrize("sample_above", [SAMPLED, EXACT])
@pytest.mark.parametrize("value", [0.0, 3.0, float("nan"), float("inf")])
def test_equal_and_non_finite_elements_give_the_right_count(value: float, sample_above: int) -> None:
    tensor = torch.full((5000,), value)
    tensor[17] = 5.0
    chosen = largest(tensor, 100, sample_above, "key")
    assert len(chosen.unique()) == 100
    assert torch.equal(chosen, chosen.sort().values)
    if value in (0.0, 3.0):
        assert 17 in chosen


# --- the message -----------------------------------------------------------------------------------------------------


def test_each_rank_sends_its_own_largest_and_keeps_the_rest() -> None:
    simulated = SimulatedRanks(2, "compression=topk", "compression.density=0.01")
    first, second = simulated.gradients()
    images = slice(0, 270)  # the first tensor in the bucket, of which 3 elements are sent
    first[images] = 0.0
    second[images] = 0.0
    first[[3, 5, 200]] = torch.tensor([8.0, -9.0, 7.0])
    first[100] = 1.0
    second[[5, 6, 269]] = torch.tensor([2.0, 3.0, 4.0])
    received = simulated.step([first, second])[images]
    assert received.nonzero().flatten().tolist() == [3, 5, 6, 200, 269]
    assert received[[3, 5, 6, 200, 269]].tolist() == [8, -7, 3, 7, 4]
    assert simulated.residuals()[images].nonzero().flatten().tolist() == [100]


def test_elements_of_a_channels_last_weight_keep_their_positions() -> None:
    compressor = make_compressor("compression=topk", "compression.density=0.01")
    bucket, receiver = bucket_for(compressor), bucket_for(compressor)
    bucket.tensors["images"][2, 3, 1, 0] = 5.0
    compressor.begin_step()
    compressor.decode(compressor.encode(bucket), receiver)
    assert receiver.tensors["images"][2, 3, 1, 0] == 5.0
    assert receiver.flat.count_nonzero() == 1


def test_bf16_rounding_error_stays_in_the_residual() -> None:
    simulated = SimulatedRanks(1, "compression=topk", "compression.density=0.01", "compression.values=bf16")
    gradient = torch.zeros_like(simulated.buckets[0].flat)
    gradient[0] = 1 + 2**-12
    received = simulated.step([gradient])
    assert received[0] == 1
    assert simulated.residuals()[0] == 2**-12


def test_full_values_are_sent_unrounded() -> None:
    simulated = SimulatedRanks(1, "compression=topk", "compression.density=0.01", "compression.values=full")
    gradient = torch.zeros_like(simulated.buckets[0].flat)
    gradient[0] = 1 + 2**-12
    assert simulated.step([gradient])[0] == 1 + 2**-12
    assert not simulated.residuals().any()


@pytest.mark.parametrize("values", ["bf16", "full"])
def test_non_finite_values_are_sent_and_leave_no_residual(values: str) -> None:
    simulated = SimulatedRanks(1, "compression=topk", "compression.density=0.02", f"compression.values={values}")
    gradient = torch.zeros_like(simulated.buckets[0].flat)
    gradient[[0, 5]] = torch.tensor([float("inf"), float("nan")])
    received = simulated.step([gradient])
    assert received[0].isinf()
    assert received[5].isnan()
    assert not simulated.residuals().any()


@pytest.mark.parametrize(("values", "bits"), [("bf16", 16), ("full", 32)])
def test_message_takes_about_six_bits_per_position(values: str, bits: int) -> None:
    compressor = make_compressor("compression=topk", "compression.density=0.05", f"compression.values={values}")
    assert isinstance(compressor, TopK)
    bucket = bucket_for(compressor)
    bucket.flat.normal_()
    compressor.begin_step()
    message = compressor.encode(bucket)
    count = sum(compressor.counts(bucket, 1).values())
    plain = 4 * bucket.uncompressed_numel
    assert message.numel() == pytest.approx(count * (bits + 6.26) / 8 + plain, abs=4 * 8)
    # As uint8, so that any backend carries it.
    assert message.dtype == torch.uint8


def test_message_size_does_not_depend_on_content() -> None:
    sizes = set()
    for fill in (0.0, 1.0, float("nan")):
        compressor = make_compressor("compression=topk")
        bucket = bucket_for(compressor)
        bucket.flat.fill_(fill)
        compressor.begin_step()
        sizes.add(compressor.encode(bucket).numel())
    assert len(sizes) == 1


def test_truncated_message_is_refused() -> None:
    compressor = make_compressor("compression=topk")
    bucket = bucket_for(compressor)
    compressor.begin_step()
    message = compressor.encode(bucket)
    with pytest.raises(ValueError, match="bytes should have"):
        compressor.decode(message[:-8], bucket)


def test_bucket_without_compressed_part_is_summed_exactly() -> None:
    simulated = SimulatedRanks(2, "compression=topk", "compression.min_elements=1000000")
    gradients = simulated.gradients()
    assert torch.equal(simulated.step(gradients), gradients[0] + gradients[1])
