"""compression=powersgd: factors, residuals, what is sent exactly, and resume."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distrain.compression.bucket import Bucket
from distrain.errors import ConfigError
from tests.compression.powersgd import make_compressor, noise, one, sent, step
from tests.runs import compose


def best(matrix: Tensor, rank: int) -> Tensor:
    """The nearest matrix of a rank."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    nearest: Tensor = (left[:, :rank] * values[:rank]) @ right[:rank]
    return nearest


# --- what is compressed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "changes", "expected"),
    [
        # 64 · 576 elements against 4 · (64 + 576).
        ((64, 64, 3, 3), {"rank": 4, "min_compression_rate": 14.4}, True),
        ((64, 64, 3, 3), {"rank": 4, "min_compression_rate": 14.5}, False),
        ((64, 64, 3, 3), {"rank": 4, "min_elements": 36_864}, True),
        ((64, 64, 3, 3), {"rank": 4, "min_elements": 36_865}, False),
        ((36_864,), {}, False),
        ((2, 500), {"rank": 9, "min_compression_rate": 0.9}, True),
        ((2, 500), {"rank": 9, "min_compression_rate": 1}, False),
        ((2, 500), {"rank": 1, "alternate": True}, True),
        # A single factor of full rank can't send the matrix exactly.
        ((2, 500), {"rank": 2, "alternate": True}, False),
    ],
)
def test_tensors_are_compressed_if_their_factors_are_smaller(
    shape: tuple[int, ...], changes: dict[str, Any], expected: bool
) -> None:
    assert make_compressor(**changes).compresses(nn.Parameter(torch.zeros(shape))) is expected


def test_alternate_requires_warm_start() -> None:
    assert compose("compression=powersgd", "compression.alternate=true").compression.name == "powersgd"
    with pytest.raises(ConfigError, match=r"compression\.warm_start"):
        compose("compression=powersgd", "compression.alternate=true", "compression.warm_start=false")


# --- what is sent ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (7, 7), (1, 9), (9, 1)])
def test_full_rank_is_exact(shape: tuple[int, int], dtype: torch.dtype) -> None:
    compressor = make_compressor(rank=9)
    for number in range(5):
        # Singular values from 1 to 1e-4 make the factors badly conditioned.
        matrix = noise(*shape, seed=number) @ torch.diag(torch.logspace(0, -4, shape[1], dtype=torch.float64))
        found = sent(compressor, matrix.to(dtype))
        assert found.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(found.double(), matrix, rtol=0, atol=tolerance * float(matrix.norm()))


@pytest.mark.parametrize("warm_start", [True, False])
def test_matrix_of_the_configured_rank_is_sent_exactly(warm_start: bool) -> None:
    compressor = make_compressor(rank=1, warm_start=warm_start)
    for number in range(4):
        matrix = noise(20, 1, seed=number) @ noise(1, 30, seed=99 + number)
        torch.testing.assert_close(sent(compressor, matrix), matrix)


def test_alternating_factors_converge_to_a_matrix_of_the_configured_rank() -> None:
    compressor = make_compressor(rank=1, alternate=True, error_feedback=False)
    matrix = noise(20, 1) @ noise(1, 30, seed=1)
    assert (sent(compressor, matrix) - matrix).norm() > 0.5 * matrix.norm()
    for _ in range(3):
        torch.testing.assert_close(sent(compressor, matrix), matrix)


@pytest.mark.parametrize("alternate", [False, True])
def test_warm_start_finds_the_nearest_matrix_of_the_rank(alternate: bool) -> None:
    matrix = noise(12, 12) @ torch.diag(torch.logspace(0, -3, 12, dtype=torch.float64)) @ noise(12, 40, seed=1)
    warm = make_compressor(rank=3, alternate=alternate, error_feedback=False)
    cold = make_compressor(rank=3, warm_start=False, error_feedback=False)
    for _ in range(60):
        found = sent(warm, matrix)
        torch.testing.assert_close(torch.linalg.matrix_rank(found), torch.tensor(3))
    torch.testing.assert_close(found, best(matrix, 3))
    lost = float((matrix - best(matrix, 3)).norm())
    draws = [float((matrix - sent(cold, matrix)).norm()) for _ in range(3)]
    assert min(draws) > 1.01 * lost
    # Each step draws its own factor.
    assert len(set(draws)) == 3


@pytest.mark.parametrize("alternate", [False, True])
def test_error_feedback_sends_a_repeated_matrix_completely(alternate: bool) -> None:
    compressor, matrix = make_compressor(alternate=alternate), noise(10, 30)
    total = torch.zeros_like(matrix)
    for _ in range(100):
        total += sent(compressor, matrix)
    assert (total / 100 - matrix).norm() < 0.1 * matrix.norm()


@pytest.mark.parametrize("alternate", [False, True])
def test_zero_gradients_do_not_block_later_steps(alternate: bool) -> None:
    compressor, dead = make_compressor(alternate=alternate), noise(8, 30)
    for _ in range(3):
        assert sent(compressor, torch.zeros(8, 30, dtype=torch.float64)).eq(0).all()
    # Filters and channels without gradients are rows and columns of zeros.
    dead[:4] = 0
    dead[:, :6] = 0
    for _ in range(2):
        assert sent(compressor, dead).norm() > 0.1 * dead.norm()


@pytest.mark.parametrize("alternate", [False, True])
@pytest.mark.parametrize("rank", [1, 3])
def test_matrix_of_lower_rank_gains_no_spurious_components(rank: int, alternate: bool) -> None:
    compressor = make_compressor(rank=rank, alternate=alternate, error_feedback=False)
    matrix = noise(20, 1, dtype=torch.float32) @ noise(1, 30, seed=1, dtype=torch.float32)
    for number in range(6):
        found = sent(compressor, matrix)
        # A projection never increases the norm, and here it soon leaves nothing out.
        assert found.norm() <= matrix.norm() * (1 + 1e-5)
        if number:
            torch.testing.assert_close(found, matrix)


@pytest.mark.parametrize("alternate", [False, True])
def test_overflow_is_visible_and_does_not_persist(alternate: bool) -> None:
    compressor, matrix = make_compressor(alternate=alternate, error_feedback=False), noise(8, 30)
    sent(compressor, matrix)
    broken = matrix.clone()
    broken[2, 3] = torch.inf
    assert not sent(compressor, broken).isfinite().all()
    for _ in range(3):
        found = sent(compressor, matrix)
        assert found.isfinite().all()
    assert found.norm() > 0.3 * matrix.norm()


@pytest.mark.parametrize("alternate", [False, True])
def test_first_steps_are_sent_uncompressed(alternate: bool) -> None:
    compressor = make_compressor(start_step=2, alternate=alternate)
    for number in range(1, 4):
        matrix = noise(8, 30, seed=number)
        found = sent(compressor, matrix)
        assert bool(torch.equal(found, matrix)) is (number <= 2)
        assert compressor.phases == (2 if number == 3 and not alternate else 1)


# --- one rank's own message -------------------------------------------------------------------------------------------


def test_message_and_residual_add_up_to_the_input() -> None:
    compressor, matrix = make_compressor(), noise(8, 30)
    lost = []
    for _ in range(8):
        compressor.begin_step()
        residual, received = one(matrix), one(noise(8, 30, seed=1))
        message = compressor.compress(residual)
        assert (
            [(part.dtype, part.numel()) for part in message]
            == compressor.message_layout(residual)
            == [
                (torch.float64, 16),
                (torch.float64, 60),
            ]
        )
        compressor.add_decompressed(message, received)
        whole = received.flat - noise(8, 30, seed=1).flatten() + residual.flat
        torch.testing.assert_close(whole.view(8, 30), matrix)
        lost.append(float(residual.flat.norm()))
    # Starting from the last message's factors makes the next one better.
    assert lost == sorted(lost, reverse=True)
    assert lost[-1] >= float((matrix - best(matrix, 2)).norm())


def test_messages_of_several_ranks_add_up() -> None:
    compressor, plain = make_compressor(start_step=1), noise(5)
    shares = [torch.cat([noise(30, seed=rank), plain]) for rank in range(2)]
    for uncompressed in (True, False):
        compressor.begin_step()
        total = torch.zeros(35, dtype=torch.float64)
        server = Bucket(total, {"weight": total[:30].view(5, 6), "bias": total[30:]}, uncompressed_numel=5)
        before = compressor.state_dict().get("residual/weight", torch.zeros(5, 6)).clone()
        for flat in shares:
            sender = Bucket(flat.clone(), {"weight": flat[:30].view(5, 6), "bias": flat[30:]}, uncompressed_numel=5)
            compressor.decode(compressor.encode(sender), server)
        left = compressor.state_dict()["residual/weight"] if not uncompressed else torch.zeros(5, 6)
        torch.testing.assert_close(server.tensors["weight"] + left - before, (shares[0] + shares[1])[:30].view(5, 6))
        torch.testing.assert_close(server.tensors["bias"], 2 * plain)


# --- what is kept between steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [3, 4])
@pytest.mark.parametrize("alternate", [False, True])
def test_restored_copy_continues_bit_for_bit(alternate: bool, steps: int) -> None:
    def gradients(number: int) -> list[Bucket]:
        return [
            one(noise(5, 31, seed=number, dtype=torch.float32), "first"),
            one(noise(17, 9, seed=-number, dtype=torch.float32), "second"),
        ]

    compressor = make_compressor(alternate=alternate)
    for number in range(steps):
        step(compressor, *gradients(number))
        compressor.compress(one(noise(5, 31, seed=number), "own"))
    saved = {name: tensor.contiguous().clone() for name, tensor in compressor.state_dict().items()}
    factors = {"p/first", "p/second"} if alternate and steps % 2 else {"q/first", "q/second"}
    assert saved.keys() == {"step", "residual/first", "residual/second", "own_q/own"} | factors
    copy = make_compressor(alternate=alternate)
    copy.load_state_dict(saved)
    for number in range(steps, steps + 3):
        pairs = list(zip(gradients(number), gradients(number), strict=True))
        step(compressor, *(bucket for bucket, _ in pairs))
        step(copy, *(bucket for _, bucket in pairs))
        assert all(torch.equal(mine.flat, theirs.flat) for mine, theirs in pairs)
        message = one(noise(5, 31, seed=number), "own")
        assert torch.equal(
            torch.cat(compressor.compress(one(message.tensors["own"], "own"))), torch.cat(copy.compress(message))
        )
    for name, tensor in compressor.state_dict().items():
        assert torch.equal(tensor, copy.state_dict()[name]), name


def test_factors_of_another_rank_are_drawn_again_by_seed_and_name() -> None:
    matrix = noise(6, 20)
    compressor = make_compressor(rank=2, error_feedback=False)
    sent(compressor, matrix)
    loaded, fresh = make_compressor(rank=3, error_feedback=False), make_compressor(rank=3, error_feedback=False)
    loaded.load_state_dict(compressor.state_dict())
    fresh.begin_step()
    found = sent(loaded, matrix)
    assert torch.equal(found, sent(fresh, matrix))
    assert torch.linalg.matrix_rank(found) == 3
    assert not torch.equal(found, sent(make_compressor(seed=1, rank=3), matrix))
    first, second = one(matrix, "first"), one(matrix, "second")
    step(make_compressor(), first, second)
    assert not torch.equal(first.flat, second.flat)
