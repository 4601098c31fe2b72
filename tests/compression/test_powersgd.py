"""compression=powersgd: factors, residuals, exact limits, resume, and agreement with the paper."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distrain.communication.collectives import Communicator, digest, ring_all_reduce_bytes
from distrain.compression.bucket import Bucket
from distrain.compression.powersgd import PowerSGD, PowerSGDConfig
from distrain.errors import ConfigError
from distrain.gradients.bucket_sizes import MIB
from distrain.gradients.buckets import Gradients
from distrain.gradients.exchange import BucketExchanger
from distrain.reporting.metrics import Stopwatch
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from tests.harness import run_ranks, soaked
from tests.runs import compose, small

ALONE = Communicator()
#: Shape of each parameter, and whether it is stored channels-last.
SHAPES: dict[str, tuple[tuple[int, ...], bool]] = {
    "stem": ((6, 3, 3, 3), True),
    "norm": ((7,), False),
    "point": ((12, 6, 1, 1), True),
    "conv": ((8, 12, 3, 3), True),
    "flat": ((1, 4, 5, 5), False),
    "dense": ((10, 64), False),
    "bias": ((10,), False),
    "tall": ((33, 2), False),
    "square": ((9, 9), False),
}


def configured(**changes: Any) -> PowerSGDConfig:
    keys: dict[str, Any] = {
        "name": "powersgd",
        "min_elements": 1,
        "error_feedback": True,
        "rank": 2,
        "warm_start": True,
        "min_compression_rate": 0,
        "start_step": 0,
        "alternate": False,
    }
    return PowerSGDConfig(**keys | changes)


def make_compressor(seed: int = 0, **changes: Any) -> PowerSGD:
    return PowerSGD(configured(**changes), seed)


def one(matrix: Tensor, name: str = "weight") -> Bucket:
    """A bucket of one matrix, copied."""
    flat = matrix.clone().flatten()
    return Bucket(flat, {name: flat.view(matrix.shape)})


def step(compressor: PowerSGD, *buckets: Bucket, communicator: Communicator = ALONE) -> None:
    """One step's exchange of all buckets."""
    exchanges = BucketExchanger(compressor, communicator, Stopwatch(torch.device("cpu")))
    compressor.begin_step()
    for bucket in buckets:
        exchanges.start(bucket)
    exchanges.finish()


def sent(compressor: PowerSGD, matrix: Tensor) -> Tensor:
    """The approximation of a matrix that a step sends."""
    bucket = one(matrix)
    step(compressor, bucket)
    return bucket.tensors["weight"]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


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


# --- several ranks ---------------------------------------------------------------------------------------------------


@dataclass
class Observations:
    """Observations of one rank over a number of steps.

    Attributes:
        buckets: Names in each bucket.
        digests: Hash of all gradients after each step.
        error: Largest deviation of aggregate and residuals from what was to be sent; gradients are about 1.
        sent: Bytes by the ledger in each step.
        results: The gradients after each of the first steps, by name.
        states: The compressor's state after these steps.
        left: Sums of the ranks' residuals after these steps, by name.
    """

    buckets: list[list[str]]
    digests: list[int]
    error: float
    sent: list[int]
    results: list[dict[str, Tensor]]
    states: list[dict[str, Tensor]]
    left: list[dict[str, Tensor]]


RUNS: dict[str, dict[str, Any]] = {
    "two phases": {},
    "in turns": {"alternate": True},
    "two phases, double": {},
    "full rank": {"rank": 64},
    "start": {"start_step": 2, "rank": 1},
    "cold": {"warm_start": False, "rank": 3},
}
#: Steps of the first two; of the others fewer.
STEPS, FEW = 60, 10


def gradient(name: str, rank: int, number: int) -> Tensor:
    """A rank's share of a gradient in a step, float64; a part of it is the same in all steps."""
    shape, seed = SHAPES[name][0], 1000 * rank + len(name)
    drawn = noise(*shape, seed=seed) + noise(*shape, seed=seed + 10 * number)
    # In one step all gradients are zero, and in one step those of rank 0.
    return torch.zeros(shape, dtype=torch.float64) if number == 7 or (number == 9 and rank == 0) else drawn


def made(compressor: PowerSGD, communicator: Communicator, dtype: torch.dtype) -> Gradients:
    named = []
    for name, (shape, channels_last) in SHAPES.items():
        layout = torch.channels_last if channels_last else torch.contiguous_format
        named.append((name, nn.Parameter(torch.zeros(shape, dtype=dtype).contiguous(memory_format=layout))))
    return Gradients(named, communicator, compressor, Stopwatch(torch.device("cpu")), 100 * 4 / MIB, 900 * 4 / MIB)


def sums(tensors: dict[str, Tensor], everyone: Communicator) -> dict[str, Tensor]:
    """Sums over the ranks, float64."""
    flat = everyone.all_reduce(torch.cat([tensor.double().flatten() for tensor in tensors.values()]))
    parts = flat.split([tensor.numel() for tensor in tensors.values()])
    return {name: part.view(tensors[name].shape) for name, part in zip(tensors, parts, strict=True)}


def on_each_rank(folder: Path) -> dict[str, Observations]:
    found = {}
    with Runtime(small("strategy=ddp", f"run_dir={folder}"), World.from_environment()) as runtime:
        everyone = runtime.communicator()
        for run, changes in RUNS.items():
            dtype = torch.float64 if "double" in run else torch.float32
            communicator = Communicator(everyone.group)
            compressor = make_compressor(**changes)
            buckets = made(compressor, communicator, dtype).buckets
            assert len(buckets) > 3
            observed = found[run] = Observations([list(bucket.tensors) for bucket in buckets], [], 0.0, [], [], [], [])
            residual = {name: torch.zeros(shape, dtype=torch.float64) for name, (shape, _) in SHAPES.items()}
            for number in range(STEPS if len(found) <= 2 else FEW):
                shares = {name: gradient(name, everyone.rank, number) for name in SHAPES}
                for bucket in buckets:
                    for name, tensor in bucket.tensors.items():
                        tensor.copy_(shares[name])
                due = sums({name: residual[name] + share for name, share in shares.items()}, everyone)
                before = communicator.ledger.total()
                step(compressor, *buckets, communicator=communicator)
                observed.sent.append(communicator.ledger.total() - before)
                state = {name: tensor.clone() for name, tensor in compressor.state_dict().items()}
                residual = {
                    name: state.get(f"residual/{name}", torch.zeros(each.shape)) for name, each in shares.items()
                }
                left = sums(residual, everyone)
                result = {name: tensor.clone() for bucket in buckets for name, tensor in bucket.tensors.items()}
                for name, tensor in result.items():
                    observed.error = max(observed.error, float((tensor + left[name] - due[name]).abs().max()))
                observed.digests.append(int(digest(bucket.flat for bucket in buckets)))
                if number < 4:
                    observed.results.append(result)
                    observed.states.append(state)
                    observed.left.append(left)
    return found


@pytest.fixture(scope="module", params=soaked([2, 3, 4], [3]))
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Observations]]:
    return run_ranks(on_each_rank, request.param, tmp_path_factory.mktemp("run"))


def rank_of(run: str, name: str) -> int | None:
    """Expected rank of a tensor's factors; ``None`` if it is sent uncompressed."""
    shape = SHAPES[name][0]
    if len(shape) == 1:
        return None
    least = min(shape[0], torch.Size(shape[1:]).numel())
    rank = min(RUNS[run].get("rank", 2), least)
    return None if rank == least and RUNS[run].get("alternate") else rank


def ring_bytes(run: str, names: list[str], number: int, ranks: int) -> int:
    """Bytes a rank should send for a bucket in a step."""
    size = 8 if "double" in run else 4
    plain = lefts = rights = whole = 0
    for name in names:
        shape, rank = torch.Size(SHAPES[name][0]), rank_of(run, name)
        whole += shape.numel()
        if rank is None:
            plain += shape.numel()
        else:
            lefts += shape[0] * rank
            rights += shape.numel() // shape[0] * rank
    messages = [plain + lefts, rights]
    if number < RUNS[run].get("start_step", 0):
        messages = [whole]
    elif RUNS[run].get("alternate"):
        messages = [plain + (rights if number % 2 else lefts)]
    return sum(ring_all_reduce_bytes(size * message, ranks) for message in messages)


@pytest.mark.parametrize("run", RUNS)
def test_all_ranks_hold_the_same_bits_after_every_step(ranks: list[dict[str, Observations]], run: str) -> None:
    assert len(set(ranks[0][run].digests)) == (STEPS if run in ("two phases", "in turns") else FEW)
    for each in ranks[1:]:
        assert each[run].digests == ranks[0][run].digests


@pytest.mark.parametrize("run", RUNS)
def test_sum_and_residuals_add_up_to_the_gradients(ranks: list[dict[str, Observations]], run: str) -> None:
    for each in ranks:
        assert each[run].error < (1e-12 if "double" in run else 1e-4)


@pytest.mark.parametrize("run", RUNS)
def test_the_ledger_counts_factors(ranks: list[dict[str, Observations]], run: str) -> None:
    for each in ranks:
        for number, sent_bytes in enumerate(each[run].sent):
            expected = sum(ring_bytes(run, names, number, len(ranks)) for names in each[run].buckets)
            assert sent_bytes == expected, number


@pytest.mark.parametrize("run", ["full rank", "start"])
def test_uncompressed_steps_and_full_rank_give_the_exact_sum(ranks: list[dict[str, Observations]], run: str) -> None:
    for number, result in enumerate(ranks[0][run].results):
        plain = {name: sum(gradient(name, rank, number) for rank in range(len(ranks))) for name in SHAPES}
        exact = [
            bool((result[name] - total).norm() <= 1e-5 * torch.as_tensor(total).norm()) for name, total in plain.items()
        ]
        assert all(exact) is (run == "full rank" or number < 2)


def as_matrix(name: str, tensor: Tensor) -> Tensor:
    """A tensor's memory as rows of its first dimension."""
    order = tensor.permute(0, 2, 3, 1) if SHAPES[name][1] else tensor
    return order.reshape(len(tensor), -1).double()


def gram_schmidt(matrix: Tensor) -> Tensor:
    columns: list[Tensor] = []
    for column in matrix.T:
        for other in columns:
            column = column - (column @ other) * other
        columns.append(column / column.norm())
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("run", ["two phases, double", "in turns"])
def test_step_agrees_with_the_formulas_of_the_paper(ranks: list[dict[str, Observations]], run: str) -> None:
    observed = ranks[0][run]
    compressed = [name for name in SHAPES if rank_of(run, name) is not None]
    assert len(compressed) > 4
    for number, result in enumerate(observed.results[1:], start=1):
        state, left_over = observed.states[number - 1], observed.left[number - 1]
        for name in compressed:
            shares = [as_matrix(name, gradient(name, rank, number)) for rank in range(len(ranks))]
            matrix = sum(shares, as_matrix(name, left_over[name]))
            if f"p/{name}" in state:
                left = gram_schmidt(state[f"p/{name}"].double())
                expected = left @ left.T @ matrix
            elif run == "in turns":
                right = gram_schmidt(state[f"q/{name}"].double().T)
                expected = matrix @ right @ right.T
            else:
                left = gram_schmidt(matrix @ state[f"q/{name}"].T)
                expected = left @ (matrix.T @ left).T
            tolerance = (1e-10 if run != "in turns" else 1e-4) * float(matrix.norm())
            torch.testing.assert_close(as_matrix(name, result[name]), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("run", ["two phases, double", "in turns"])
def test_residuals_are_orthogonal_to_what_was_sent(ranks: list[dict[str, Observations]], run: str) -> None:
    compressed = [name for name in SHAPES if rank_of(run, name) is not None]
    for each in ranks:
        for number, (result, state) in enumerate(zip(each[run].results, each[run].states, strict=True)):
            for name in compressed:
                sent_part, residual_part = as_matrix(name, result[name]), as_matrix(name, state[f"residual/{name}"])
                if run == "in turns" and number % 2 == 0:
                    sent_part, residual_part = sent_part.T, residual_part.T
                overlap = (sent_part.T @ residual_part).norm() / sent_part.norm()
                assert overlap < (1e-10 if run != "in turns" else 1e-3)
