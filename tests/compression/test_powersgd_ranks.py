"""compression=powersgd on several ranks: the same bits on all of them, exact limits, and agreement with the paper."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distrain.communication.collectives import Communicator, digest, ring_all_reduce_bytes
from distrain.compression.powersgd import PowerSGD
from distrain.gradients.bucket_sizes import MIB
from distrain.gradients.buckets import Gradients
from distrain.reporting.metrics import Stopwatch
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from tests.compression.powersgd import make_compressor, noise, step
from tests.harness import run_ranks, soaked
from tests.runs import small

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
