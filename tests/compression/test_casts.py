"""compression=fp16 and bf16: every gradient in 16 bits, summed in 16 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from distrain.communication.collectives import Communicator, digest, ring_all_reduce_bytes
from distrain.gradients.exchange import BucketExchanger
from distrain.reporting.metrics import Stopwatch
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from tests.compression.simulated_ranks import Odd, SimulatedRanks, bucket_for, make_compressor
from tests.harness import run_ranks
from tests.runs import small

#: Dtype of each cast, and the largest relative error of one rounding.
CASTS = {"fp16": (torch.float16, 2**-11), "bf16": (torch.bfloat16, 2**-8)}
both = pytest.mark.parametrize("name", CASTS)


@both
def test_small_tensors_and_vectors_are_cast_too(name: str) -> None:
    bucket = bucket_for(make_compressor(f"compression={name}"))
    assert bucket.uncompressed_numel == 0
    assert bucket.tensors["bias"].numel() == 11


@both
def test_two_ranks_get_the_rounded_sum_of_rounded_gradients(name: str) -> None:
    dtype, _ = CASTS[name]
    simulated = SimulatedRanks(2, f"compression={name}")
    first, second = simulated.gradients()
    expected = first.to(dtype) + second.to(dtype)
    assert torch.equal(simulated.step([first, second]), expected.float())


@both
def test_values_exact_in_16_bits_are_summed_exactly(name: str) -> None:
    simulated = SimulatedRanks(3, f"compression={name}")
    shares = [torch.arange(len(simulated.buckets[0].flat)).remainder(64).float() for _ in range(3)]
    assert torch.equal(simulated.step(shares), 3 * shares[0])


def test_fp16_overflows_to_infinity_and_underflows_to_zero() -> None:
    simulated = SimulatedRanks(1, "compression=fp16")
    gradient = torch.zeros_like(simulated.buckets[0].flat)
    gradient[:5] = torch.tensor([1e5, -1e5, float("nan"), 1e-8, 6e4])
    received = simulated.step([gradient])
    assert received[:2].tolist() == [float("inf"), float("-inf")]
    assert received[2].isnan()
    assert received[3] == 0
    assert received[4] == pytest.approx(6e4, rel=2**-11)


def test_bf16_has_the_range_of_float32() -> None:
    simulated = SimulatedRanks(1, "compression=bf16")
    gradient = torch.logspace(-37, 38, len(simulated.buckets[0].flat))
    torch.testing.assert_close(simulated.step([gradient]), gradient, rtol=2**-8, atol=0)


@both
def test_message_takes_two_bytes_per_element_and_is_added(name: str) -> None:
    dtype, error = CASTS[name]
    compressor = make_compressor(f"compression={name}")
    bucket = bucket_for(compressor)
    given = torch.linspace(0.5, 2, bucket.flat.numel())
    bucket.flat.copy_(given)
    message = compressor.encode(bucket)
    assert message.numel() == pytest.approx(2 * given.numel(), abs=7)
    assert bucket.flat.abs().max() <= error  # the rounding error
    assert torch.equal(bucket.flat + given.to(dtype), given)
    receiver = bucket_for(compressor)
    receiver.flat.fill_(1)
    compressor.decode(message, receiver)
    assert torch.equal(receiver.flat, 1 + given.to(dtype).float())


@both
def test_double_gradients_stay_double(name: str) -> None:
    dtype, _ = CASTS[name]
    compressor = make_compressor(f"compression={name}")
    bucket = bucket_for(compressor, Odd().double())
    bucket.flat.fill_(1 / 3)
    for pending in compressor.aggregate(bucket, Communicator()):
        pending.wait()
    assert bucket.flat.dtype == torch.float64
    assert bucket.flat[0] == torch.tensor(1 / 3).to(dtype).double()


@both
def test_only_the_step_is_kept_between_steps(name: str) -> None:
    compressor = make_compressor(f"compression={name}")
    compressor.begin_step()
    assert compressor.state_dict() == {"step": torch.tensor(1)}
    assert compressor.residual_norm() is None


def _on_rank() -> dict[str, Any]:
    """Both casts among real ranks."""
    found: dict[str, Any] = {}
    world = World.from_environment()
    with Runtime(small("strategy=ddp"), world, keep_logs=False) as runtime:
        for name in CASTS:
            everyone = runtime.communicator()
            compressor = make_compressor(f"compression={name}")
            bucket = bucket_for(compressor, nn.Linear(257, 129))
            torch.manual_seed(world.rank)
            bucket.flat.normal_()
            exact = everyone.all_reduce(bucket.flat.double())
            before = everyone.ledger.total()
            exchanges = BucketExchanger(compressor, everyone, Stopwatch(runtime.device))
            exchanges.start(bucket)
            exchanges.finish()
            found[name] = {
                "digest": int(digest([bucket.flat])),
                "error": float((bucket.flat - exact).abs().max()),
                "bytes": everyone.ledger.total() - before,
                "elements": bucket.flat.numel(),
            }
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_gloo_sums_16_bits(ranks: int) -> None:
    everyone = run_ranks(_on_rank, ranks)
    for name, (_, error) in CASTS.items():
        first = everyone[0][name]
        assert all(found[name] == first for found in everyone)
        # Numbers up to 8, rounded once per rank and once per addition.
        assert 0 < first["error"] < 8 * error * ranks
        assert first["bytes"] == ring_all_reduce_bytes(2 * first["elements"], ranks)
