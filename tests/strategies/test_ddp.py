"""strategy=ddp beyond parity: equal starts, empty shares, BatchNorm, bytes, and one rank's overflow."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distrain.communication.collectives import ring_all_reduce_bytes
from distrain.data.batch import Batch
from distrain.data.sampler import shard_bounds
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.strategies.replicated import Replicated
from tests.harness import run_ranks
from tests.runs import small, train_on_rank
from tests.strategies.helpers import batch, drawn, parameters, set_up, single

RANKS = 3
#: Sizes that nobody need measure.
BUCKETS = ("strategy.first_bucket_mb=1", "strategy.bucket_mb=1", "strategy.last_bucket_mb=0")


def network(seed: int = 0, *, norm: bool = False, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    between = nn.BatchNorm2d(6) if norm else nn.Identity()
    model = nn.Sequential(nn.Conv2d(3, 6, 3), between, nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 4))
    return model.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


class Constants(nn.Module):
    """A buffer that never changes, beside a normalisation layer whose buffers do."""

    constants: Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("constants", torch.rand(1000, generator=generator))
        self.norm = nn.BatchNorm1d(4)

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = self.norm(input)
        return out


def whole_batches(shape: tuple[int, ...] = (3, 6, 6), sizes: tuple[int, ...] = (10, 2, 7)) -> list[Batch]:
    """They don't divide by three, and the second leaves a rank without samples."""
    return [drawn(size, *shape, seed=size, dtype=torch.float64) for size in sizes]


def share(whole: Batch, strategy: Replicated, dtype: torch.dtype = torch.float64) -> Batch:
    return batch(whole.inputs.to(dtype), whole.targets, strategy.data_shard)


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


Build = Callable[..., Replicated]


def equal_starts(build: Build, rank: int) -> dict[str, Any]:
    kept = Lines()
    logging.getLogger("distrain").addHandler(kept)
    same = build(network(0), *BUCKETS)
    quiet = list(kept.lines)
    different = build(network(rank, norm=True))
    logging.getLogger("distrain").removeHandler(kept)
    return {
        "same": parameters(same.model),
        "sent for equal ones": dict(same.ledger.sent),
        "quiet": quiet,
        "different": parameters(different.model),
        "warnings": [line for line in kept.lines if line.startswith("WARNING")],
    }


def steps(build: Build, norm: bool, *overrides: str) -> dict[str, Any]:
    strategy = build(network(norm=norm), "trainer.precision=fp64", *overrides)
    found: dict[str, Any] = {"parameters": [], "sent": [], "counts": []}
    for whole in whole_batches():
        before = strategy.ledger.total()
        result = strategy.train_step(share(whole, strategy))
        found["sent"].append(strategy.ledger.total() - before)
        found["parameters"].append(parameters(strategy.model))
        found["counts"].append((result.count, float(result.loss_sum), int(result.metric_sums)))
    found["norm"] = float(strategy.gradient_norm())
    found["formula"] = strategy.uncompressed_bytes_per_step()
    return found


def local_statistics(build: Build) -> dict[str, Any]:
    model = Constants()
    strategy = build(model, "strategy.batchnorm=local")
    constants = model.constants.clone()
    strategy.train_step(share(drawn(9, 4), strategy, torch.float32))
    own = model.norm.running_mean
    assert own is not None
    found: dict[str, Any] = {"own": own.clone()}
    found["evaluation"] = strategy.eval_step(share(drawn(9, 4, seed=1), strategy, torch.float32)).loss_sum
    found["settled"] = own.clone()
    before = strategy.ledger.total()
    found["state"] = strategy.model_state()["norm.running_mean"].clone()
    found["sent again"] = strategy.ledger.total() - before
    strategy.train_step(share(drawn(9, 4), strategy, torch.float32))
    found["later"] = strategy.model_state()["norm.running_mean"].clone()
    found["constants stay"] = torch.equal(model.constants, constants)
    return found


def evaluation_without_running_statistics(build: Build) -> tuple[float, int]:
    model = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False, dtype=torch.float64))
    strategy = build(model, "trainer.precision=fp64")
    result = strategy.eval_step(share(whole_batches((4,))[1], strategy))
    return float(result.loss_sum), result.count


def overflow_on_one_rank(build: Build, rank: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    strategy = build(model, "trainer.precision=fp16")
    before, whole = parameters(model), drawn(9, 6)
    whole.inputs[-1] = 1e30
    mine = share(whole, strategy, torch.float32)
    overflowed = bool((mine.inputs == 1e30).any())
    strategy.train_step(mine)
    unchanged = torch.equal(parameters(model), before)
    strategy.train_step(share(drawn(9, 6), strategy, torch.float32))
    return {
        "overflowed": overflowed,
        "unchanged": unchanged,
        "precision": strategy.state_dict()["scalars"]["precision"],
        "parameters": parameters(model),
    }


def on_each_rank(folder: Path) -> dict[str, Any]:
    config = small("strategy=ddp", f"run_dir={folder}")
    with Runtime(config, World.from_environment()) as runtime:
        rank = runtime.world.rank

        def build(model: nn.Module, *overrides: str) -> Replicated:
            return set_up(model, small("strategy=ddp", "optimizer=sgd", *overrides), runtime)

        strategy = build(network())
        assert strategy.mesh is not None
        return {
            "place": (strategy.data_shard, strategy.mesh.mesh_dim_names, tuple(strategy.mesh.shape)),
            "start": equal_starts(build, rank),
            "plain": steps(build, False, "strategy.first_bucket_mb=0.001"),
            "pieces": steps(build, False, "trainer.micro_batch_size=3", "trainer.grad_clip_norm=0.1"),
            "norm": steps(build, True),
            "local": local_statistics(build),
            "evaluation": evaluation_without_running_statistics(build),
            "overflow": overflow_on_one_rank(build, rank),
        }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(on_each_rank, RANKS, tmp_path_factory.mktemp("run"))


def test_each_rank_has_a_shard_along_the_data_dimension(ranks: list[dict[str, Any]]) -> None:
    assert [each["place"] for each in ranks] == [((rank, RANKS), ("data",), (RANKS,)) for rank in range(RANKS)]


# --- the start -------------------------------------------------------------------------------------------------------


def test_equal_starts_are_found_out_by_eight_bytes(ranks: list[dict[str, Any]]) -> None:
    for each in ranks:
        assert torch.equal(each["start"]["same"], parameters(network(0)))
        sent = each["start"]["sent for equal ones"]
        assert sent["all_gather"] == 8 * (RANKS - 1)
        # What ranks agree on in set-up are numbers.
        assert sum(sent.values()) < 100
        assert each["start"]["quiet"] == []


def test_where_initial_parameters_differ_rank_0_s_are_taken_with_a_warning(ranks: list[dict[str, Any]]) -> None:
    for each in ranks:
        assert torch.equal(each["start"]["different"], parameters(network(0, norm=True)))
        assert each["start"]["warnings"] == [
            "WARNING the initial parameters of ranks [1, 2] differ from those of rank 0, which all ranks use"
        ]


# --- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("plain", ()),
        ("pieces", ("trainer.micro_batch_size=3", "trainer.grad_clip_norm=0.1")),
        ("norm", ()),
    ],
)
def test_steps_are_those_of_one_process(ranks: list[dict[str, Any]], kind: str, overrides: tuple[str, ...]) -> None:
    model = network(norm=kind == "norm")
    alone = single(model, "trainer.precision=fp64", *overrides)
    for step, whole in enumerate(whole_batches()):
        expected = alone.train_step(whole)
        for each in ranks:
            torch.testing.assert_close(each[kind]["parameters"][step], parameters(model), rtol=1e-12, atol=1e-13)
            assert torch.equal(each[kind]["parameters"][step], ranks[0][kind]["parameters"][step])
        counts, losses, correct = zip(*(each[kind]["counts"][step] for each in ranks), strict=True)
        bounds = [shard_bounds(whole.global_count, rank, RANKS) for rank in range(RANKS)]
        assert list(counts) == [end - start for start, end in bounds]
        assert sum(losses) == pytest.approx(float(expected.loss_sum), rel=1e-12)
        assert sum(correct) == int(expected.metric_sums)
    for each in ranks:
        assert each[kind]["norm"] == pytest.approx(float(alone.gradient_norm()), rel=1e-12)


def test_a_step_sends_what_a_ring_sends_for_each_bucket(ranks: list[dict[str, Any]]) -> None:
    layers = [2 * 3 * 3 * 3 * 3 * 8 + 6 * 8, (96 * 4 + 4) * 8]
    for each in ranks:
        # The linear layer's weight alone is larger than the first bucket, so that its bias travels first.
        expected = sum(ring_all_reduce_bytes(size, RANKS) for size in (4 * 8, 96 * 4 * 8 + layers[0]))
        assert each["plain"]["formula"] == expected
        assert each["plain"]["sent"] == [expected] * 3


def test_batch_norm_s_own_collectives_are_counted(ranks: list[dict[str, Any]]) -> None:
    # Sums with a count, then squares; in the backward pass two sums: each of six channels in float64.
    small_ones = sum(ring_all_reduce_bytes(8 * values, RANKS) for values in (7, 6, 12))
    for each in ranks:
        assert each["norm"]["sent"] == [each["norm"]["formula"] + small_ones] * 3


# --- BatchNorm -------------------------------------------------------------------------------------------------------


def test_local_statistics_are_averaged_before_anybody_reads_them(ranks: list[dict[str, Any]]) -> None:
    own = [each["local"]["own"] for each in ranks]
    assert not torch.equal(own[0], own[1])
    average = torch.stack(own).double().mean(0).float()
    for each in ranks:
        assert torch.equal(each["local"]["settled"], average)
        assert torch.equal(each["local"]["state"], average)
        assert each["local"]["sent again"] == 0
        assert torch.equal(each["local"]["later"], ranks[0]["local"]["later"])
        assert not torch.equal(each["local"]["later"], average)
        assert each["local"]["constants stay"]


def test_evaluation_by_the_batch_s_own_statistics_needs_ranks_without_samples_too(ranks: list[dict[str, Any]]) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False, dtype=torch.float64))
    expected = single(model, "trainer.precision=fp64").eval_step(whole_batches((4,))[1])
    assert [each["evaluation"][1] for each in ranks] == [1, 1, 0]
    assert sum(each["evaluation"][0] for each in ranks) == pytest.approx(float(expected.loss_sum), rel=1e-12)


# --- fp16 ------------------------------------------------------------------------------------------------------------


def test_one_rank_s_overflow_is_everybody_s(ranks: list[dict[str, Any]]) -> None:
    assert [each["overflow"]["overflowed"] for each in ranks] == [False, False, True]
    for each in ranks:
        assert each["overflow"]["unchanged"]
        assert each["overflow"]["precision"] == {"scale": 32768, "good_steps": 1}
        assert torch.equal(each["overflow"]["parameters"], ranks[0]["overflow"]["parameters"])


# --- whole runs ------------------------------------------------------------------------------------------------------


def test_the_summary_says_what_a_ring_sends(tmp_path: Path) -> None:
    options = ("strategy=ddp", "trainer.max_steps=3", "trainer.grad_clip_norm=1", f"run_dir={tmp_path}")
    first, second = run_ranks(train_on_rank, 2, small(*options))
    size = sum(4 * tensor.numel() for tensor in first["model"].values())
    summary = first["summary"]
    # Each of two ranks sends the whole once: half while reducing, half while gathering.
    assert summary["bytes_sent_per_step"] == summary["bytes_uncompressed_per_step"] == 2 * size
    assert summary["mesh"] == {"data": 2}
    assert summary["world_size"] == 2
    assert summary["time_share"]["communication"] > 0
    # Only the rank that writes the summary asks git.
    differing = ("images_per_second", "step_ms", "wall_seconds", "start", "end", "git")
    assert {k: v for k, v in second["summary"].items() if k not in differing} == {
        k: v for k, v in summary.items() if k not in differing
    }


def test_ddp_of_one_rank_is_single(tmp_path: Path) -> None:
    options = ("model=custom", "model._target_=tests.runs.NormNet", "+model.kwargs.norm=batch", "trainer.max_steps=6")
    runs = {
        name: train_on_rank(small(*options, f"strategy={name}", f"run_dir={tmp_path / name}"))
        for name in ("ddp", "single")
    }
    for name, tensor in runs["single"]["model"].items():
        assert torch.equal(runs["ddp"]["model"][name], tensor), name
    assert runs["ddp"]["summary"]["bytes_sent_per_step"] == 0
    assert runs["ddp"]["summary"]["bytes_uncompressed_per_step"] == 0
    assert runs["ddp"]["summary"]["test_correct"] == runs["single"]["summary"]["test_correct"]
