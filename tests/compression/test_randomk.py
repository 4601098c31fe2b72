"""compression=randomk: random elements that all ranks draw alike, so an all-reduce can sum their values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distrain.compression.randomk import RandomK
from tests.compression.simulated_ranks import SimulatedRanks, bucket_for, make_compressor


def randomk(*overrides: str, seed: int = 0) -> RandomK:
    made = make_compressor("compression=randomk", "compression.density=0.05", *overrides, seed=seed)
    assert isinstance(made, RandomK)
    return made


class Twins(nn.Module):
    """Two tensors of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(50, 20))
        self.b = nn.Parameter(torch.zeros(50, 20))


class OneTwin(nn.Module):
    """The first of them alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(50, 20))


def sent(compressor: RandomK, model: type[nn.Module] = Twins) -> dict[str, list[int]]:
    """Which elements of each tensor are sent in the next step."""
    bucket, receiver = bucket_for(compressor, model()), bucket_for(compressor, model())
    bucket.flat.fill_(1)
    compressor.begin_step()
    compressor.decode(compressor.encode(bucket), receiver)
    return {name: tensor.nonzero().flatten().tolist() for name, tensor in receiver.compressed_tensors.items()}


def test_ranks_send_the_same_elements() -> None:
    assert sent(randomk()) == sent(randomk())


def test_draws_differ_between_tensors_steps_and_seeds() -> None:
    compressor = randomk()
    first, second, other = sent(compressor), sent(compressor), sent(randomk(seed=1))
    assert len(first["a"]) == 50
    draws = [first["a"], first["b"], second["a"], second["b"], other["a"], other["b"]]
    assert len({tuple(draw) for draw in draws}) == 6


def test_draw_does_not_depend_on_other_tensors_of_the_bucket() -> None:
    assert sent(randomk(), OneTwin)["a"] == sent(randomk(), Twins)["a"]


def test_values_of_all_ranks_are_summed_where_they_were_drawn() -> None:
    simulated = SimulatedRanks(3, "compression=randomk", "compression.density=0.05", model=Twins)
    gradients = simulated.gradients()
    received, total = simulated.step(gradients), sum(gradients[1:], start=gradients[0])
    chosen = received != 0
    assert chosen.sum() == 100
    torch.testing.assert_close(received[chosen], total[chosen])
    assert not simulated.residuals()[chosen].any()


def test_every_element_is_sent_eventually() -> None:
    simulated = SimulatedRanks(1, "compression=randomk", "compression.density=0.25", model=Twins)
    gradient = simulated.gradients()[0]
    total = simulated.step([gradient])
    for _ in range(60):
        total += simulated.step([torch.zeros_like(gradient)])
    torch.testing.assert_close(total, gradient)


@pytest.mark.parametrize("density", [0.3, 0.7])
def test_without_error_feedback_the_expected_sum_is_the_uncompressed_one(density: float) -> None:
    overrides = ("compression=randomk", f"compression.density={density}", "compression.error_feedback=false")
    simulated = SimulatedRanks(1, *overrides, model=Twins)
    gradient = torch.ones(2000)
    steps, mean = 400, torch.zeros(2000)
    for _ in range(steps):
        received = simulated.step([gradient])
        assert received.sum() == pytest.approx(2000)
        mean += received / steps
    # Six standard deviations of 1 drawn with probability p and divided by p.
    assert (mean - 1).abs().max() < 6 * ((1 / density - 1) / steps) ** 0.5


def test_receiver_at_another_step_derives_the_positions() -> None:
    sender, receiver = randomk(), randomk()
    bucket = bucket_for(sender, Twins())
    bucket.flat.copy_(torch.arange(1.0, 2001.0))
    given = bucket.flat.clone()
    for _ in range(3):
        sender.begin_step()
    message = sender.encode(bucket)
    receiver.begin_step()
    received = bucket_for(receiver, Twins())
    receiver.decode(message, received)
    chosen = received.flat != 0
    assert chosen.sum() == 100
    assert torch.equal(received.flat[chosen], given[chosen])


def test_message_holds_the_step_and_the_values() -> None:
    compressor = randomk()
    bucket = bucket_for(compressor, Twins())
    compressor.begin_step()
    assert compressor.encode(bucket).numel() == 8 + 4 * 100


def test_bucket_without_compressed_part_is_summed_exactly() -> None:
    simulated = SimulatedRanks(2, "compression=randomk", "compression.min_elements=1000000")
    gradients: list[Tensor] = simulated.gradients()
    assert torch.equal(simulated.step(gradients), gradients[0] + gradients[1])
