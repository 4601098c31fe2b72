"""What top-k and random-k have in common: how much is sent, error feedback, momentum correction, and drawing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distrain.communication.collectives import digest, ring_all_reduce_bytes
from distrain.compression.error_feedback import Residuals
from distrain.compression.sparse import SparseCompressor, stratified_sample
from distrain.errors import ConfigError
from distrain.gradients.exchange import BucketExchanger
from distrain.reporting.metrics import Stopwatch
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from tests.compression.simulated_ranks import SimulatedRanks, bucket_for, make_compressor
from tests.harness import run_ranks
from tests.runs import compose, small

both = pytest.mark.parametrize("name", ["topk", "randomk"])


def sparse(*overrides: str, seed: int = 0) -> SparseCompressor:
    made = make_compressor(*overrides, seed=seed)
    assert isinstance(made, SparseCompressor)
    return made


class Vector(nn.Module):
    """Eight elements that are compressed, and two that aren't."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 4))
        self.bias = nn.Parameter(torch.zeros(2))


# --- how much is sent ------------------------------------------------------------------------------------------------


@both
def test_number_of_elements_is_density_times_size_rounded_up(name: str) -> None:
    compressor = sparse(f"compression={name}", "compression.density=0.1")
    bucket = bucket_for(compressor)
    assert compressor.counts(bucket, 1) == {"images": 27, "many": 6554, "few": 1, "one": 1}
    assert bucket.uncompressed_numel == 11


@both
def test_warmup_density_falls_exponentially_from_a_quarter(name: str) -> None:
    compressor = sparse(f"compression={name}", "compression.density=0.001", "compression.warmup_steps=4")
    densities = [compressor.density(step) for step in range(1, 8)]
    assert densities[0] == 0.25
    factor = (0.001 / 0.25) ** (1 / 4)
    assert densities[1:4] == pytest.approx([0.25 * factor, 0.25 * factor**2, 0.25 * factor**3])
    assert densities[4:] == [0.001] * 3


@both
def test_warmup_density_is_never_below_the_final_one(name: str) -> None:
    compressor = sparse(f"compression={name}", "compression.density=0.5", "compression.warmup_steps=4")
    assert {compressor.density(step) for step in range(1, 8)} == {0.5}


@both
def test_messages_shrink_during_warmup(name: str) -> None:
    compressor = sparse(f"compression={name}", "compression.density=0.01", "compression.warmup_steps=3")
    bucket, sizes = bucket_for(compressor), []
    for _ in range(5):
        compressor.begin_step()
        bucket.flat.normal_()
        sizes.append(compressor.encode(bucket).numel())
    assert sizes[0] > 2 * sizes[1] > 4 * sizes[2] > 8 * sizes[3]
    assert sizes[3] == sizes[4]


@both
def test_momentum_correction_needs_error_feedback(name: str) -> None:
    with pytest.raises(
        ConfigError, match=r"compression.momentum_correction=0.9: needs compression.error_feedback=true"
    ):
        compose(f"compression={name}", "compression.momentum_correction=0.9", "compression.error_feedback=false")


@both
def test_momentum_correction_excludes_optimizer_momentum(name: str) -> None:
    chosen = (f"compression={name}", "compression.momentum_correction=0.9", "optimizer=sgd")
    SparseCompressor.check(compose(*chosen))
    with pytest.raises(ConfigError, match=r"momentum_correction=0.9: takes the place of optimizer.momentum=0.5"):
        SparseCompressor.check(compose(*chosen, "optimizer.momentum=0.5"))


@both
@pytest.mark.parametrize(
    ("key", "value"), [("density", 0), ("density", 1.5), ("momentum_correction", 1), ("warmup_steps", -1)]
)
def test_values_outside_their_limits_are_refused(name: str, key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"compression.{key}={value}"):
        compose(f"compression={name}", f"compression.{key}={value}")


# --- error feedback ---------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("more", [(), ("compression.warmup_steps=3",)], ids=["", "warmup"])
def test_sum_and_residuals_add_up_to_the_gradients(name: str, more: tuple[str, ...]) -> None:
    simulated = SimulatedRanks(3, f"compression={name}", "compression.density=0.05", *more)
    for _ in range(5):
        residual, gradients = simulated.residuals(), simulated.gradients()
        aggregated = simulated.step(gradients)
        # Up to the rounding of a few float32 additions of numbers up to about 10.
        torch.testing.assert_close(
            aggregated + simulated.residuals(), sum(gradients, start=residual), rtol=0, atol=1e-5
        )
    assert simulated.residuals().any()


@both
def test_uncompressed_tensors_are_summed_exactly(name: str) -> None:
    simulated = SimulatedRanks(3, f"compression={name}", "compression.density=0.05")
    gradients = simulated.gradients()
    aggregated = simulated.step(gradients)
    torch.testing.assert_close(aggregated[-11:], sum(gradients[1:], start=gradients[0])[-11:])


@both
@pytest.mark.parametrize("feedback", ["true", "false"])
def test_full_density_gives_the_exact_sum_and_no_residual(name: str, feedback: str) -> None:
    values = ("compression.values=full",) if name == "topk" else ()
    simulated = SimulatedRanks(
        3, f"compression={name}", "compression.density=1", f"compression.error_feedback={feedback}", *values
    )
    for _ in range(2):
        gradients = simulated.gradients()
        aggregated, expected = simulated.step(gradients), sum(gradients[1:], start=gradients[0])
        assert (aggregated - expected).norm() <= 1e-6 * expected.norm()
        assert not simulated.residuals().any()


@both
def test_without_error_feedback_no_residual_is_kept(name: str) -> None:
    simulated = SimulatedRanks(2, f"compression={name}", "compression.error_feedback=false")
    simulated.step(simulated.gradients())
    assert simulated.compressors[0].state_dict().keys() == {"step"}
    aggregated = simulated.step([torch.zeros_like(bucket.flat) for bucket in simulated.buckets])
    assert not aggregated.any()


@both
def test_residual_norm_is_the_norm_of_all_residuals(name: str) -> None:
    simulated = SimulatedRanks(1, f"compression={name}", "compression.density=0.05")
    assert simulated.compressors[0].residual_norm() is None
    simulated.step(simulated.gradients())
    norm = simulated.compressors[0].residual_norm()
    assert norm is not None
    torch.testing.assert_close(norm, simulated.residuals().norm())


# --- momentum correction ---------------------------------------------------------------------------------------------


@both
def test_velocity_accumulates_and_is_cleared_where_elements_are_sent(name: str) -> None:
    simulated = SimulatedRanks(
        1, f"compression={name}", "compression.density=0.25", "compression.momentum_correction=0.5", model=Vector
    )
    compressor, (bucket,) = simulated.compressors[0], simulated.buckets
    assert isinstance(compressor.residuals, Residuals)
    velocity, residual = torch.zeros(8), torch.zeros(8)
    # Rolled, so that top-k also sends other elements in each step. All values are exact in bf16.
    for step in range(6):
        gradient = torch.zeros(10)
        gradient[:8] = torch.tensor([1.0, -2, 0.5, 4, 0.25, -1, 2, 0]).roll(step)
        velocity = 0.5 * velocity + gradient[:8]
        residual = residual + velocity
        aggregated = simulated.step([gradient])[:8]
        sent = aggregated != 0
        assert 1 <= sent.sum() <= 2
        assert torch.equal(aggregated[sent], residual[sent])
        residual[sent], velocity[sent] = 0, 0
        if name == "randomk":  # it may send zeros
            chosen = state_of(simulated, "velocity") != velocity
            assert chosen.sum() <= 2 - sent.sum()
            residual[chosen], velocity[chosen] = 0, 0
        assert torch.equal(state_of(simulated, "velocity"), velocity)
        assert torch.equal(state_of(simulated, "residual"), residual)
    assert velocity.any()
    assert bucket.uncompressed_numel == 2


def state_of(simulated: SimulatedRanks, what: str) -> Tensor:
    return simulated.compressors[0].state_dict()[f"{what}/weight"].flatten()


@both
def test_uncompressed_tensors_have_no_momentum(name: str) -> None:
    simulated = SimulatedRanks(1, f"compression={name}", "compression.momentum_correction=0.5", model=Vector)
    assert [simulated.step([torch.ones(10)])[-2:].tolist() for _ in range(3)] == [[1, 1]] * 3


# --- resuming --------------------------------------------------------------------------------------------------------


@both
def test_restored_compressor_continues_bit_for_bit(name: str) -> None:
    overrides = (
        f"compression={name}",
        "compression.density=0.05",
        "compression.momentum_correction=0.9",
        "compression.warmup_steps=4",
    )
    simulated, resumed = SimulatedRanks(2, *overrides), SimulatedRanks(2, *overrides)
    for _ in range(3):
        simulated.step(simulated.gradients())
    for compressor, fresh in zip(simulated.compressors, resumed.compressors, strict=True):
        fresh.load_state_dict({key: tensor.clone() for key, tensor in compressor.state_dict().items()})
    for _ in range(3):
        gradients = simulated.gradients()
        assert torch.equal(simulated.step(gradients), resumed.step(gradients))


# --- drawing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "count"), [(1, 1), (7, 1), (7, 7), (7, 5), (65_537, 1), (65_537, 3277), (65_537, 65_536)]
)
def test_drawn_positions_are_distinct_and_in_range(size: int, count: int) -> None:
    for key in "abc":
        drawn = stratified_sample(size, count, key)
        assert drawn.dtype == torch.int64
        assert len(drawn.unique()) == count
        assert drawn.min() >= 0
        assert drawn.max() < size


def test_draw_depends_on_its_key_alone() -> None:
    torch.manual_seed(1)
    first = stratified_sample(10_000, 100, "key")
    torch.manual_seed(2)
    assert torch.equal(stratified_sample(10_000, 100, "key"), first)
    assert not torch.equal(stratified_sample(10_000, 100, "another key"), first)


@pytest.mark.parametrize(("size", "count"), [(10, 7), (23, 5), (12, 4)])
def test_all_positions_are_equally_likely(size: int, count: int) -> None:
    draws = 4000
    seen = torch.zeros(size)
    for number in range(draws):
        seen[stratified_sample(size, count, str(number))] += 1
    share = count / size
    # Five standard deviations of a binomial distribution.
    assert (seen / draws - share).abs().max() < 5 * (share * (1 - share) / draws) ** 0.5


def test_every_position_of_an_interval_can_be_drawn() -> None:
    # Intervals of three and of two: the second draw may lie next to the first or far from it, on either side.
    drawn = [stratified_sample(5, 2, str(number)) for number in range(60)]
    assert {int(second - first) % 5 for first, second in drawn} == {1, 2, 3, 4}


# --- real ranks ------------------------------------------------------------------------------------------------------


def _on_rank() -> dict[str, Any]:
    """Three steps with each compressor among real ranks."""
    found: dict[str, Any] = {}
    world = World.from_environment()
    with Runtime(small("strategy=ddp"), world, keep_logs=False) as runtime:
        for name in ("topk", "randomk"):
            everyone = runtime.communicator()
            compressor = sparse(f"compression={name}", "compression.density=0.05")
            bucket = bucket_for(compressor)
            exchanges = BucketExchanger(compressor, everyone, Stopwatch(runtime.device))
            torch.manual_seed(world.rank)
            contributed, aggregated = torch.zeros_like(bucket.flat), torch.zeros_like(bucket.flat)
            for _ in range(3):
                compressor.begin_step()
                bucket.flat.normal_()
                contributed += bucket.flat
                before = everyone.ledger.total()
                exchanges.start(bucket)
                exchanges.finish()
                sent = everyone.ledger.total() - before
                aggregated += bucket.flat
            residual = torch.cat(
                [compressor.state_dict()[f"residual/{key}"].flatten() for key in bucket.compressed_tensors]
            )
            everyone.all_reduce(contributed)
            everyone.all_reduce(residual)
            inside = contributed.numel() - bucket.uncompressed_numel
            names = list(bucket.compressed_tensors)
            flat = torch.cat([bucket.tensors[key].flatten() for key in names])
            assert flat.numel() == inside
            found[name] = {
                "digest": int(digest([aggregated])),
                "sent": sent,
                "message": compressor.encode(bucket).numel(),
                "elements": sum(compressor.counts(bucket, compressor.step).values()) + bucket.uncompressed_numel,
                "sum": (float(aggregated[:inside].sum() + residual.sum()), float(contributed[:inside].sum())),
            }
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_gloo_ranks_get_equal_sums_and_bytes_are_counted(ranks: int) -> None:
    everyone = run_ranks(_on_rank, ranks)
    for name in ("topk", "randomk"):
        assert len({found[name]["digest"] for found in everyone}) == 1
        sum_and_residuals, contributed = everyone[0][name]["sum"]
        assert sum_and_residuals == pytest.approx(contributed, abs=0.05)
    for found in everyone:
        assert found["topk"]["sent"] == (ranks - 1) * found["topk"]["message"]
        assert found["randomk"]["sent"] == ring_all_reduce_bytes(4 * found["randomk"]["elements"], ranks)
