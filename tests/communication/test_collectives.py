"""Collectives send nothing for one rank, are right for several ranks, and count the bytes on the wire."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distrain.communication.collectives import Communicator, Ledger, _tree_children, digest, ring_all_reduce_bytes
from distrain.communication.types import DONE
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from tests.harness import run_ranks
from tests.runs import small

INTERFACES = Path("/proc/net/dev")
MB = 1_000_000


# --- one rank --------------------------------------------------------------------------------------------------------


def test_one_rank_needs_no_group_and_sends_nothing() -> None:
    alone, tensor = Communicator(), torch.tensor([1.0, 2.0])
    assert (alone.rank, alone.size) == (0, 1)
    assert alone.all_reduce(tensor) is tensor
    assert alone.all_reduce(tensor, "max") is tensor
    assert alone.start_all_reduce(tensor) is DONE
    assert alone.broadcast(tensor) is tensor
    (gathered,) = alone.all_gather(tensor)
    assert gathered is tensor
    assert alone.reduce_scatter(tensor) is tensor
    alone.barrier()
    assert tensor.tolist() == [1.0, 2.0]
    assert alone.ledger.total() == 0


def test_tensor_that_is_not_divisible_among_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a tensor of shape \[\] can't be cut in 1 equal parts"):
        Communicator().reduce_scatter(torch.ones(()))


# --- the formulas ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "each"), [(1, 0), (2, 1200), (3, 1600), (4, 1800), (5, 1920)])
def test_ring_all_reduce_sends_the_tensor_twice_without_the_own_part(ranks: int, each: int) -> None:
    assert ring_all_reduce_bytes(1200, ranks) == each


@pytest.mark.parametrize("ranks", range(1, 10))
def test_broadcast_tree_reaches_every_rank_once_from_any_source(ranks: int) -> None:
    for source in range(ranks):
        sends = [_tree_children(rank, source, ranks) for rank in range(ranks)]
        assert sum(sends) == ranks - 1
        # In a binomial tree the source sends in every round, and each round doubles the ranks that have the tensor.
        assert sends[source] == max(sends) == (ranks - 1).bit_length()


def test_ledger_adds_up_all_kinds_of_collectives() -> None:
    ledger = Ledger()
    ledger.sent["all_reduce"] += 5
    ledger.sent["broadcast"] += 7
    assert ledger.total() == 12
    assert Communicator(ledger=ledger).ledger is ledger


# --- several ranks ---------------------------------------------------------------------------------------------------


def sent_by_loopback() -> int:
    """Bytes that this host's loopback interface has sent."""
    (line,) = [line for line in INTERFACES.read_text().splitlines() if line.strip().startswith("lo:")]
    return int(line.partition(":")[2].split()[8])


def measured_to_counted(everyone: Communicator, operation: Callable[[], Any]) -> float:
    """Bytes sent by the interface divided by those counted; the least of three, because others use it too."""
    ratios = []
    operation()
    for _ in range(3):
        before = everyone.ledger.total()
        everyone.barrier()
        start = sent_by_loopback()
        everyone.barrier()
        for _ in range(5):
            operation()
        everyone.barrier()
        sent = sent_by_loopback() - start
        counted = torch.tensor(everyone.ledger.total() - before)
        everyone.all_reduce(counted)
        ratios.append(sent / int(counted))
    return min(ratios)


def on_each_rank(folder: Path, shared_memory: str) -> dict[str, Any]:
    configuration = small("strategy=ddp", f"run_dir={folder}", f"runtime.shared_memory={shared_memory}")
    with Runtime(configuration, World.from_environment()) as runtime:
        everyone = runtime.communicator()
        rank = everyone.rank
        found: dict[str, Any] = {
            "place": (rank, everyone.size),
            "medium": (shared_memory, everyone.medium(torch.ones(1))),
        }
        mine = torch.tensor([1.0, 10.0]) * (rank + 1)
        for reduction in ("sum", "max", "min"):
            tensor = mine.clone()
            assert everyone.all_reduce(tensor, reduction) is tensor
            found[reduction] = tensor.tolist()
        started = mine.clone()
        pending = everyone.start_all_reduce(started)
        pending.wait()
        found["started"] = started.tolist()
        found["broadcast"] = [everyone.broadcast(mine.clone(), source).tolist() for source in range(everyone.size)]
        found["gathered"] = [each.tolist() for each in everyone.all_gather(mine)]
        found["sent"] = dict(everyone.ledger.sent)
        rows = torch.arange(2.0 * everyone.size).view(everyone.size, 2) * (rank + 1)
        found["scattered"] = everyone.reduce_scatter(rows).tolist()
        if shared_memory == "off" and INTERFACES.exists():
            big = torch.ones(8 * MB // 4)
            found["ratios"] = {
                "all_reduce": measured_to_counted(everyone, lambda: everyone.all_reduce(big.zero_())),
                "broadcast": measured_to_counted(everyone, lambda: everyone.broadcast(big, 1)),
                "all_gather": measured_to_counted(everyone, lambda: everyone.all_gather(big)),
                "reduce_scatter": measured_to_counted(everyone, lambda: everyone.reduce_scatter(big[: MB * 6 // 4])),
            }
    return found


@pytest.fixture(scope="module", params=[(2, "off"), (3, "off"), (3, "auto")])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    ranks, shared_memory = request.param
    return run_ranks(on_each_rank, ranks, tmp_path_factory.mktemp("run"), shared_memory)


def test_collectives_of_several_ranks_are_right(found: list[dict[str, Any]]) -> None:
    ranks = len(found)
    factors = range(1, ranks + 1)
    for rank, each in enumerate(found):
        assert each["place"] == (rank, ranks)
        assert each["medium"] in (("off", "gloo"), ("auto", "shared memory"))
        assert each["sum"] == each["started"] == [sum(factors), 10 * sum(factors)]
        assert each["max"] == [ranks, 10 * ranks]
        assert each["min"] == [1, 10]
        assert each["broadcast"] == each["gathered"] == [[factor, 10 * factor] for factor in factors]
        assert each["scattered"] == [[2 * rank * sum(factors), (2 * rank + 1) * sum(factors)]]
        # Four all-reduces of 8 bytes, one broadcast from each rank, one gather of 8 bytes.
        assert each["sent"]["all_reduce"] == 4 * ring_all_reduce_bytes(8, ranks)
        assert each["sent"]["all_gather"] == 8 * (ranks - 1)
    assert sum(each["sent"]["broadcast"] for each in found) == ranks * 8 * (ranks - 1)


@pytest.mark.skipif(not INTERFACES.exists(), reason="no interface counters here")
def test_counted_bytes_agree_with_the_network_interface(found: list[dict[str, Any]]) -> None:
    for kind, ratio in found[0].get("ratios", {}).items():
        # Never fewer than counted; the rest is headers and acknowledgements.
        assert 1 <= ratio <= 1.05, kind


# --- comparing tensors -----------------------------------------------------------------------------------------------


def test_digest_is_the_same_for_every_layout() -> None:
    images = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    others = [
        images.clone(),
        images.contiguous(memory_format=torch.channels_last),
        torch.stack([images] * 2, -1)[..., 1],
    ]
    assert {int(digest([other])) for other in others} == {int(digest([images]))}


def test_digest_of_any_dtype_fits_int64() -> None:
    tensors: list[Tensor] = [
        torch.tensor(3),
        torch.tensor([True, False]),
        torch.ones(3, dtype=torch.bfloat16),
        torch.empty(0),
        torch.nn.Parameter(torch.ones(2, 2)).t(),
    ]
    found = digest(tensors)
    assert (found.dtype, found.shape, found.device.type) == (torch.int64, (), "cpu")
    assert all(int(digest([torch.tensor(seed)])) >= 0 for seed in range(20))


@pytest.mark.parametrize(
    "other",
    [
        torch.tensor([0.0, 1.0, 2.0, 3.0 + 2**-22]),
        torch.tensor([-0.0, 1.0, 2.0, 3.0]),
        torch.tensor([1.0, 0.0, 2.0, 3.0]),
        torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64),
        torch.tensor([0.0, 1.0, 2.0]),
    ],
    ids=["last bit", "sign of zero", "order", "type", "length"],
)
def test_digest_differs_for_different_tensors(other: Tensor) -> None:
    assert int(digest([other])) != int(digest([torch.tensor([0.0, 1.0, 2.0, 3.0])]))
