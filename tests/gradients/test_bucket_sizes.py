"""Bucket sizes follow from the cost of an all-reduce, and a resumed run keeps them."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from distrain.communication.collectives import Communicator, ring_all_reduce_bytes
from distrain.compression.autotune.link_model import LinkModel, LinkSample
from distrain.gradients import bucket_sizes
from distrain.gradients.bucket_sizes import (
    DEFAULT_SIZES,
    MIB,
    ONE_BUCKET,
    AllReduceCost,
    BucketSizes,
    BucketSizing,
    choose_sizes,
    describe_choice,
    gradient_bytes_of,
)
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.strategies.ddp import DDP
from tests.harness import run_ranks
from tests.runs import small
from tests.strategies.helpers import drawn, set_up

CPU = torch.device("cpu")
#: A link of 1 Gbit/s between two hosts, one on which a single bucket is always best, and two ranks of one host.
ETHERNET = AllReduceCost(latency=0.0003, seconds_per_byte=8e-9, processor_share=0.1)
SLOW_START = AllReduceCost(latency=0.1, seconds_per_byte=1e-9, processor_share=0.1)
LOOPBACK = AllReduceCost(latency=0.002, seconds_per_byte=1e-9, processor_share=0.6)


# --- the choice ------------------------------------------------------------------------------------------------------


def test_a_small_model_has_one_bucket() -> None:
    assert choose_sizes(LOOPBACK, 490_000) == ONE_BUCKET
    assert choose_sizes(ETHERNET, 20_000) == ONE_BUCKET


def test_transfers_that_occupy_the_processors_are_not_split() -> None:
    assert (
        choose_sizes(AllReduceCost(latency=0.00001, seconds_per_byte=1e-9, processor_share=1.0), 1000 * MIB)
        == ONE_BUCKET
    )


def test_latency_is_a_small_part_of_a_bucket_s_cost() -> None:
    sizes = choose_sizes(ETHERNET, 45 * MIB)
    latency = ETHERNET.latency
    assert 0.01 < latency / (sizes.other * MIB * ETHERNET.seconds_per_byte) < 0.03
    assert sizes == BucketSizes(1.0, 2.0, 0.25)


def test_buckets_are_small_enough_to_overlap() -> None:
    # The latency alone would make them larger.
    assert choose_sizes(LOOPBACK, 45 * MIB).other == 45 / 4
    assert choose_sizes(LOOPBACK, 1000 * MIB).other == 25
    assert choose_sizes(ETHERNET, 490_000).first == pytest.approx(490_000 / MIB / 4)


def test_higher_latency_makes_larger_buckets() -> None:
    others = [
        choose_sizes(AllReduceCost(latency, 8e-9, 0.0), 100 * MIB).other for latency in (0.0001, 0.0003, 0.001, 0.003)
    ]
    assert others == sorted(set(others))


def test_the_cost_follows_from_a_link_model() -> None:
    ranks = 3
    times = [(1024, 0.001, 0.001), (MIB, 0.011, 0.006), (4 * MIB, 0.041, 0.021)]
    link = LinkModel({"all_reduce": [LinkSample(ring_all_reduce_bytes(size, ranks), *each) for size, *each in times]})
    cost = AllReduceCost.of(link, ranks)
    assert cost.latency == 0.001
    assert cost.seconds_per_byte == pytest.approx(0.01 / MIB, rel=1e-2)
    assert cost.processor_share == pytest.approx(0.5, rel=1e-2)


def test_requested_sizes_are_used_without_measuring() -> None:
    # A group that fails at any communication.
    group = Communicator()
    group.size = 2
    asked = BucketSizing((1, 2, 0), group, group, CPU, MIB)
    assert asked.sizes(100 * MIB) == BucketSizes(1, 2, 0)
    assert asked.state_dict() is None
    deterministic = BucketSizing((None, 3, None), group, group, CPU, MIB, deterministic=True)
    assert deterministic.sizes(100 * MIB) == BucketSizes(DEFAULT_SIZES.first, 3, DEFAULT_SIZES.last)
    assert deterministic.state_dict() is None


def test_one_rank_has_one_bucket() -> None:
    assert BucketSizing((None, None, None), Communicator(), Communicator(), CPU, MIB).sizes(1000 * MIB) == ONE_BUCKET


@pytest.mark.parametrize(
    ("buckets", "buckets_line"),
    [
        ([MIB // 2], "gradients are sent in one bucket of 0.5 MiB, after the backward pass"),
        ([MIB, 9 * MIB, 4 * MIB], "gradients are sent in 3 buckets of 1 to 9 MiB"),
    ],
    ids=["one", "several"],
)
def test_the_log_says_what_was_measured_and_chosen(buckets: list[int], buckets_line: str) -> None:
    line = describe_choice(AllReduceCost(0.0021, 1e-8, 0.25), buckets)
    assert (
        line
        == f"an all-reduce has a latency of 2.1 ms and takes 10 ms per MiB, 25% of it processor time: {buckets_line}"
    )


# --- in a run --------------------------------------------------------------------------------------------------------


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 4))


def layout(strategy: DDP) -> list[list[str]]:
    return [list(bucket.tensors) for bucket in strategy.gradients.buckets]


def hooks(strategy: DDP) -> int:
    # torch has no public way to ask.
    return sum(bool(parameter._post_accumulate_grad_hooks) for parameter in strategy.model.parameters())


def measured_and_resumed(folder: Path) -> dict[str, Any]:
    with Runtime(small("strategy=ddp", f"run_dir={folder}"), World.from_environment()) as runtime:

        def build(*overrides: str) -> DDP:
            strategy = set_up(model(), small("strategy=ddp", "optimizer=sgd", *overrides), runtime)
            assert isinstance(strategy, DDP)
            return strategy

        cost = build().state_dict()["scalars"]["buckets"]
        # On a busy machine each measurement may choose another layout.
        with mock.patch.object(bucket_sizes, "measure_cost", return_value=SLOW_START):
            first = build()
            again, elsewhere, asked = build(), build(), build("strategy.bucket_mb=0.001")
        saved = first.state_dict()
        result = {"cost": cost, "flat": layout(first), "hooks of one": hooks(first)}
        # As if the saved run had used another link.
        saved["scalars"]["buckets"] = {"latency": 0.0, "a_byte": 1e-6, "busy": 0.0}
        state = {**saved, "model": first.model_state(), "layout": first.layout}
        state["compressor"] = [saved["compressor"]] * runtime.world.size
        again.load_state_dict(state)
        elsewhere.load_state_dict({**state, "layout": {**first.layout, "world_size": 7}})
        asked.load_state_dict(state)
        result |= {"again": layout(again), "hooks of several": hooks(again), "elsewhere": layout(elsewhere)}
        result |= {"asked": [bucket.bytes for bucket in asked.gradients.buckets]}
        result["kept"] = again.state_dict()["scalars"]["buckets"] == saved["scalars"]["buckets"]
        batch = drawn(9, 6)
        for strategy in (first, again):
            strategy.train_step(batch)
        result["parameters"] = [
            torch.cat([p.detach().flatten() for p in strategy.model.parameters()]) for strategy in (first, again)
        ]
        return result


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(measured_and_resumed, 2, tmp_path_factory.mktemp("run"))


def test_all_ranks_use_the_same_measured_cost(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["cost"] == ranks[1]["cost"]
    assert ranks[0]["cost"]["latency"] > 0


def test_a_single_bucket_needs_no_hooks(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert [len(names) for names in rank["flat"]] == [6]
        assert rank["hooks of one"] == 0
        assert rank["hooks of several"] == 6


def test_a_resumed_run_keeps_the_saved_run_s_layout(ranks: list[dict[str, Any]]) -> None:
    size = gradient_bytes_of(model())
    for rank in ranks:
        assert len(rank["again"]) > 1
        assert rank["again"] == ranks[0]["again"]
        assert rank["kept"]
        # A cost measured with another number of ranks is ignored.
        assert rank["elsewhere"] == rank["flat"]
        # A requested size takes precedence over the saved choice.
        assert len(rank["asked"]) > 2
        assert sum(rank["asked"]) == size


def test_the_layout_changes_nothing_but_rounding(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        torch.testing.assert_close(*rank["parameters"], rtol=1e-5, atol=1e-7)
