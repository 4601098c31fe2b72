"""compression=randomk: random elements that all ranks know, so that their values are summed on the way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distrain.compression.randomk import RandomK
from tests.compression.crowd import Crowd, bucket_for, compressor


def randomk(*overrides: str, seed: int = 0) -> RandomK:
    made = compressor("compression=randomk", "compression.density=0.05", *overrides, seed=seed)
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


def sent(used: RandomK, model: type[nn.Module] = Twins) -> dict[str, list[int]]:
    """Which elements of each tensor are sent in the next step."""
    bucket, receiver = bucket_for(used, model()), bucket_for(used, model())
    bucket.flat.fill_(1)
    used.begin_step()
    used.decode(used.encode(bucket), receiver)
    return {name: tensor.nonzero().flatten().tolist() for name, tensor in receiver.compressed_tensors.items()}


def test_ranks_send_the_same_elements() -> None:
    assert sent(randomk()) == sent(randomk())


def test_tensors_steps_and_seeds_differ() -> None:
    used = randomk()
    first, second, other = sent(used), sent(used), sent(randomk(seed=1))
    assert len(first["a"]) == 50
    draws = [first["a"], first["b"], second["a"], second["b"], other["a"], other["b"]]
    assert len({tuple(draw) for draw in draws}) == 6


def test_the_draw_does_not_depend_on_what_else_is_in_the_bucket() -> None:
    assert sent(randomk(), OneTwin)["a"] == sent(randomk(), Twins)["a"]


def test_values_of_all_ranks_are_summed_where_they_were_drawn() -> None:
    crowd = Crowd(3, "compression=randomk", "compression.density=0.05", model=Twins)
    gradients = crowd.gradients()
    got, total = crowd.step(gradients), sum(gradients[1:], start=gradients[0])
    chosen = got != 0
    assert chosen.sum() == 100
    torch.testing.assert_close(got[chosen], total[chosen])
    assert not crowd.owed()[chosen].any()


def test_every_element_is_sent_in_time() -> None:
    crowd = Crowd(1, "compression=randomk", "compression.density=0.25", model=Twins)
    gradient = crowd.gradients()[0]
    total = crowd.step([gradient])
    for _ in range(60):
        total += crowd.step([torch.zeros_like(gradient)])
    torch.testing.assert_close(total, gradient)


@pytest.mark.parametrize("density", [0.3, 0.7])
def test_without_error_feedback_the_expected_sum_is_the_uncompressed_one(density: float) -> None:
    overrides = ("compression=randomk", f"compression.density={density}", "compression.error_feedback=false")
    crowd = Crowd(1, *overrides, model=Twins)
    gradient = torch.ones(2000)
    steps, mean = 400, torch.zeros(2000)
    for _ in range(steps):
        got = crowd.step([gradient])
        assert got.sum() == pytest.approx(2000)
        mean += got / steps
    # Six standard deviations of 1 drawn with probability p and divided by p.
    assert (mean - 1).abs().max() < 6 * ((1 / density - 1) / steps) ** 0.5


def test_a_receiver_at_another_step_knows_the_elements() -> None:
    sender, receiver = randomk(), randomk()
    bucket = bucket_for(sender, Twins())
    bucket.flat.copy_(torch.arange(1.0, 2001.0))
    given = bucket.flat.clone()
    for _ in range(3):
        sender.begin_step()
    message = sender.encode(bucket)
    receiver.begin_step()
    got = bucket_for(receiver, Twins())
    receiver.decode(message, got)
    chosen = got.flat != 0
    assert chosen.sum() == 100
    assert torch.equal(got.flat[chosen], given[chosen])


def test_a_message_is_the_step_and_the_values() -> None:
    used = randomk()
    bucket = bucket_for(used, Twins())
    used.begin_step()
    assert used.encode(bucket).numel() == 8 + 4 * 100


def test_a_bucket_with_nothing_to_compress_travels_as_it_is() -> None:
    crowd = Crowd(2, "compression=randomk", "compression.min_elements=1000000")
    gradients: list[Tensor] = crowd.gradients()
    assert torch.equal(crowd.step(gradients), gradients[0] + gradients[1])
