"""What top-k and random-k have in common: how much is sent, what is kept, and that nothing is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distrain.communication.collectives import digest, ring_all_reduce_bytes
from distrain.compression.error_feedback import Residuals
from distrain.compression.sparse import SparseCompressor, stratified_sample
from distrain.errors import ConfigError
from distrain.gradients.exchange import Exchanges
from distrain.reporting.metrics import Stopwatch
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from tests.compression.crowd import Crowd, bucket_for, compressor
from tests.harness import run_ranks
from tests.runs import compose, small

both = pytest.mark.parametrize("name", ["topk", "randomk"])


def sparse(*overrides: str, seed: int = 0) -> SparseCompressor:
    made = compressor(*overrides, seed=seed)
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
def test_of_every_tensor_the_same_share_is_sent_rounded_up(name: str) -> None:
    used = sparse(f"compression={name}", "compression.density=0.1")
    bucket = bucket_for(used)
    assert used.counts(bucket, 1) == {"images": 27, "many": 6554, "few": 1, "one": 1}
    assert bucket.uncompressed_numel == 11


@both
def test_warm_up_begins_at_a_quarter_and_falls_by_the_same_factor_each_step(name: str) -> None:
    used = sparse(f"compression={name}", "compression.density=0.001", "compression.warmup_steps=4")
    densities = [used.density(step) for step in range(1, 8)]
    assert densities[0] == 0.25
    factor = (0.001 / 0.25) ** (1 / 4)
    assert densities[1:4] == pytest.approx([0.25 * factor, 0.25 * factor**2, 0.25 * factor**3])
    assert densities[4:] == [0.001] * 3


@both
def test_warm_up_never_sends_less_than_what_follows(name: str) -> None:
    used = sparse(f"compression={name}", "compression.density=0.5", "compression.warmup_steps=4")
    assert {used.density(step) for step in range(1, 8)} == {0.5}


@both
def test_messages_shrink_during_warm_up(name: str) -> None:
    used = sparse(f"compression={name}", "compression.density=0.01", "compression.warmup_steps=3")
    bucket, sizes = bucket_for(used), []
    for _ in range(5):
        used.begin_step()
        bucket.flat.normal_()
        sizes.append(used.encode(bucket).numel())
    assert sizes[0] > 2 * sizes[1] > 4 * sizes[2] > 8 * sizes[3]
    assert sizes[3] == sizes[4]


@both
def test_momentum_correction_needs_error_feedback(name: str) -> None:
    with pytest.raises(
        ConfigError, match=r"compression.momentum_correction=0.9: needs compression.error_feedback=true"
    ):
        compose(f"compression={name}", "compression.momentum_correction=0.9", "compression.error_feedback=false")


@both
def test_momentum_correction_takes_the_place_of_the_optimizer_s(name: str) -> None:
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


# --- nothing is lost -------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("more", [(), ("compression.warmup_steps=3",)], ids=["", "warmup"])
def test_what_came_and_what_is_still_owed_is_what_was_given(name: str, more: tuple[str, ...]) -> None:
    crowd = Crowd(3, f"compression={name}", "compression.density=0.05", *more)
    for _ in range(5):
        owed, gradients = crowd.owed(), crowd.gradients()
        got = crowd.step(gradients)
        # To the rounding of a few float32 additions of numbers up to about 10.
        torch.testing.assert_close(got + crowd.owed(), sum(gradients, start=owed), rtol=0, atol=1e-5)
    assert crowd.owed().any()


@both
def test_tensors_that_travel_as_they_are_are_summed(name: str) -> None:
    crowd = Crowd(3, f"compression={name}", "compression.density=0.05")
    gradients = crowd.gradients()
    got = crowd.step(gradients)
    torch.testing.assert_close(got[-11:], sum(gradients[1:], start=gradients[0])[-11:])


@both
@pytest.mark.parametrize("feedback", ["true", "false"])
def test_at_full_density_the_sum_is_the_uncompressed_one_and_nothing_is_owed(name: str, feedback: str) -> None:
    values = ("compression.values=full",) if name == "topk" else ()
    crowd = Crowd(3, f"compression={name}", "compression.density=1", f"compression.error_feedback={feedback}", *values)
    for _ in range(2):
        gradients = crowd.gradients()
        got, expected = crowd.step(gradients), sum(gradients[1:], start=gradients[0])
        assert (got - expected).norm() <= 1e-6 * expected.norm()
        assert not crowd.owed().any()


@both
def test_without_error_feedback_nothing_is_kept(name: str) -> None:
    crowd = Crowd(2, f"compression={name}", "compression.error_feedback=false")
    crowd.step(crowd.gradients())
    assert crowd.compressors[0].state_dict().keys() == {"step"}
    got = crowd.step([torch.zeros_like(bucket.flat) for bucket in crowd.buckets])
    assert not got.any()


@both
def test_the_residual_s_norm_is_that_of_what_is_owed(name: str) -> None:
    crowd = Crowd(1, f"compression={name}", "compression.density=0.05")
    assert crowd.compressors[0].residual_norm() is None
    crowd.step(crowd.gradients())
    norm = crowd.compressors[0].residual_norm()
    assert norm is not None
    torch.testing.assert_close(norm, crowd.owed().norm())


# --- momentum correction ---------------------------------------------------------------------------------------------


@both
def test_momentum_gathers_where_nothing_is_sent_and_is_forgotten_where_it_is(name: str) -> None:
    crowd = Crowd(
        1, f"compression={name}", "compression.density=0.25", "compression.momentum_correction=0.5", model=Vector
    )
    used, (bucket,) = crowd.compressors[0], crowd.buckets
    assert isinstance(used.residuals, Residuals)
    velocity, owed = torch.zeros(8), torch.zeros(8)
    # So that top-k, too, sends other elements in each step; all exact in bf16.
    for step in range(6):
        gradient = torch.zeros(10)
        gradient[:8] = torch.tensor([1.0, -2, 0.5, 4, 0.25, -1, 2, 0]).roll(step)
        velocity = 0.5 * velocity + gradient[:8]
        owed = owed + velocity
        got = crowd.step([gradient])[:8]
        sent = got != 0
        assert 1 <= sent.sum() <= 2
        assert torch.equal(got[sent], owed[sent])
        owed[sent], velocity[sent] = 0, 0
        if name == "randomk":  # it may send what is zero
            chosen = state_of(crowd, "velocity") != velocity
            assert chosen.sum() <= 2 - sent.sum()
            owed[chosen], velocity[chosen] = 0, 0
        assert torch.equal(state_of(crowd, "velocity"), velocity)
        assert torch.equal(state_of(crowd, "residual"), owed)
    assert velocity.any()
    assert bucket.uncompressed_numel == 2


def state_of(crowd: Crowd, what: str) -> Tensor:
    return crowd.compressors[0].state_dict()[f"{what}/weight"].flatten()


@both
def test_plain_tensors_have_no_momentum(name: str) -> None:
    crowd = Crowd(1, f"compression={name}", "compression.momentum_correction=0.5", model=Vector)
    assert [crowd.step([torch.ones(10)])[-2:].tolist() for _ in range(3)] == [[1, 1]] * 3


# --- resuming --------------------------------------------------------------------------------------------------------


@both
def test_a_new_compressor_with_the_state_goes_on_bit_for_bit(name: str) -> None:
    overrides = (
        f"compression={name}",
        "compression.density=0.05",
        "compression.momentum_correction=0.9",
        "compression.warmup_steps=4",
    )
    crowd, resumed = Crowd(2, *overrides), Crowd(2, *overrides)
    for _ in range(3):
        crowd.step(crowd.gradients())
    for used, fresh in zip(crowd.compressors, resumed.compressors, strict=True):
        fresh.load_state_dict({key: tensor.clone() for key, tensor in used.state_dict().items()})
    for _ in range(3):
        gradients = crowd.gradients()
        assert torch.equal(crowd.step(gradients), resumed.step(gradients))


# --- drawing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "count"), [(1, 1), (7, 1), (7, 7), (7, 5), (65_537, 1), (65_537, 3277), (65_537, 65_536)]
)
def test_positions_drawn_differ_and_lie_in_range(size: int, count: int) -> None:
    for key in "abc":
        drawn = stratified_sample(size, count, key)
        assert drawn.dtype == torch.int64
        assert len(drawn.unique()) == count
        assert drawn.min() >= 0
        assert drawn.max() < size


def test_the_draw_depends_on_its_key_alone() -> None:
    torch.manual_seed(1)
    first = stratified_sample(10_000, 100, "key")
    torch.manual_seed(2)
    assert torch.equal(stratified_sample(10_000, 100, "key"), first)
    assert not torch.equal(stratified_sample(10_000, 100, "another key"), first)


@pytest.mark.parametrize(("size", "count"), [(10, 7), (23, 5), (12, 4)])
def test_every_position_is_as_likely_as_any_other(size: int, count: int) -> None:
    draws = 4000
    seen = torch.zeros(size)
    for number in range(draws):
        seen[stratified_sample(size, count, str(number))] += 1
    share = count / size
    # Five standard deviations of a binomial distribution.
    assert (seen / draws - share).abs().max() < 5 * (share * (1 - share) / draws) ** 0.5


def test_every_position_of_a_stretch_can_be_drawn() -> None:
    # Stretches of three and of two, so that the second draw may lie next to the first or far from it, on either side.
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
            used = sparse(f"compression={name}", "compression.density=0.05")
            bucket = bucket_for(used)
            exchanges = Exchanges(used, everyone, Stopwatch(runtime.device))
            torch.manual_seed(world.rank)
            given, got = torch.zeros_like(bucket.flat), torch.zeros_like(bucket.flat)
            for _ in range(3):
                used.begin_step()
                bucket.flat.normal_()
                given += bucket.flat
                before = everyone.ledger.total()
                exchanges.start(bucket)
                exchanges.finish()
                sent = everyone.ledger.total() - before
                got += bucket.flat
            kept = torch.cat([used.state_dict()[f"residual/{key}"].flatten() for key in bucket.compressed_tensors])
            everyone.all_reduce(given)
            everyone.all_reduce(kept)
            inside = given.numel() - bucket.uncompressed_numel
            names = list(bucket.compressed_tensors)
            flat = torch.cat([bucket.tensors[key].flatten() for key in names])
            assert flat.numel() == inside
            found[name] = {
                "digest": int(digest([got])),
                "sent": sent,
                "message": used.encode(bucket).numel(),
                "elements": sum(used.counts(bucket, used.step).values()) + bucket.uncompressed_numel,
                "sum": (float(got[:inside].sum() + kept.sum()), float(given[:inside].sum())),
            }
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_on_gloo_all_ranks_get_the_same_and_the_ledger_counts_the_messages(ranks: int) -> None:
    everyone = run_ranks(_on_rank, ranks)
    for name in ("topk", "randomk"):
        assert len({found[name]["digest"] for found in everyone}) == 1
        came, given = everyone[0][name]["sum"]
        assert came == pytest.approx(given, abs=0.05)
    for found in everyone:
        assert found["topk"]["sent"] == (ranks - 1) * found["topk"]["message"]
        assert found["randomk"]["sent"] == ring_all_reduce_bytes(4 * found["randomk"]["elements"], ranks)
