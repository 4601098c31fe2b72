"""Predicted steps of ``fsdp`` and of sharpness-aware minimization against calculations by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from distrain.tools.planning import candidates
from distrain.tools.planning.network import Network
from distrain.tools.planning.prediction import Memory, Prediction
from distrain.tools.planning.steps import ddp, fsdp, pipeline
from distrain.tools.planning.steps.common import Setting
from distrain.tools.planning.steps.sharded_blocks import blocks_of_buckets, gathered_blocks
from tests.tools.planning.workloads import MB, cluster, workload

MIB = 2**20


def setting(hosts: int = 4, per_host: int = 1, bytes_per_second: float = 100.0 * MB, **changed: Any) -> Setting:
    """Four ranks with 16 samples each: a block takes 16 ms forward and 32 ms backward, and has 10 MB."""
    machines = cluster(hosts, per_host, bytes_per_second=bytes_per_second)
    return Setting(dataclasses.replace(workload(), **changed), machines, Network(machines))


def predicted(where: Setting, shard: str, **options: Any) -> Prediction:
    return fsdp.predict(where, {}, shard=shard, **options)


@pytest.mark.parametrize(
    ("shard", "options", "seconds", "sent"),
    [
        # ddp with a bucket a block; then 4 parts of 2.5 MB are sent to 3 ranks each, 75 ms a block.
        ("optimizer", {}, 0.064 + 0.032 + 4 * 0.15 + 4 * 0.075, 90),
        # Half of that for the gradients.
        ("gradients", {}, 0.064 + 0.032 + 4 * 0.075 + 4 * 0.075, 60),
        # Gathered for the forward pass, 4 * 75 ms with what the last block computes; backward the last block stays.
        # Then the link has its gradients, from 348 ms on, and those and the parameters of three blocks in turn.
        ("full", {}, 4 * 0.075 + 0.016 + 0.032 + 7 * 0.075, 82.5),
        ("full", {"reshards": False}, 4 * 0.075 + 0.016 + 0.032 + 4 * 0.075, 60),
    ],
)
def test_a_step_by_hand(shard: str, options: dict[str, Any], seconds: float, sent: float) -> None:
    found = predicted(setting(), shard, **options)
    assert found.seconds == pytest.approx(seconds)
    assert found.bytes_sent == pytest.approx(sent * MB)
    assert found.same_as_single


def test_a_fast_link_leaves_what_is_computed_and_each_rank_updates_its_part() -> None:
    fast = setting(bytes_per_second=1e15, update_seconds=0.4, copy_seconds=0.02)
    times = {shard: predicted(fast, shard).seconds for shard in ("optimizer", "gradients", "full")}
    # Gradients that are scattered are copied into one tensor first.
    assert times == pytest.approx({"optimizer": 0.192 + 0.1, "gradients": 0.212 + 0.1, "full": 0.212 + 0.1})


def test_replicas_add_up_the_parts_while_the_backward_pass_goes_on() -> None:
    found = predicted(setting(2, 2), "full", shard_size=2)
    # Within hosts nothing takes time. A rank's 5 MB of a block, which both ranks of a host send at once, take 100 ms.
    # The first ones begin when the second block is complete, after 64 + 2 * 32 ms.
    assert found.seconds == pytest.approx(0.128 + 4 * 0.1)
    # Gathered: 4 and 3 blocks of 5 MB; scattered: 4; added up: 4.
    assert found.bytes_sent == pytest.approx(15 * 5 * MB)


def test_pieces_gather_the_parameters_again_but_send_gradients_once() -> None:
    pieces = setting(micro_batch_size=8)
    assert predicted(pieces, "full").bytes_sent == pytest.approx((2 * 52.5 + 30) * MB)
    assert predicted(pieces, "full", reshards=False).bytes_sent == pytest.approx(60 * MB)
    assert predicted(pieces, "gradients").bytes_sent == pytest.approx(60 * MB)


def test_frozen_blocks_are_gathered_but_not_sent_back() -> None:
    first, *others = workload().blocks
    frozen = dataclasses.replace(first, gradients=(), state_bytes=10 * MB)
    # Once, since no gradient needs it in the backward pass.
    assert predicted(setting(blocks=(frozen, *others)), "full").bytes_sent == pytest.approx((30 + 15 + 22.5) * MB)
    # Where gradients are divided, all parameters stay.
    assert predicted(setting(blocks=(frozen, *others)), "gradients").bytes_sent == pytest.approx(2 * 22.5 * MB)


def test_layers_that_share_their_statistics_wait_for_each_other() -> None:
    slow = setting(bytes_per_second=1e15, blocks=workload(batchnorms=2).blocks)
    machines = dataclasses.replace(slow.cluster, spread=0.1)
    shaken = Setting(slow.workload, machines, slow.network)
    alone = Setting(workload(), machines, slow.network)
    # 8 layers with 3 collectives each: in 25 parts of a step chance adds up to five times as much.
    ratio = predicted(shaken, "full").parts["stragglers"] / predicted(alone, "full").parts["stragglers"]
    assert ratio == pytest.approx(5, rel=0.01)


@pytest.mark.parametrize(
    ("shard", "options", "held"),
    [
        # Parameters, gradients and two numbers for each; activations of 16 samples in 4 blocks.
        ("optimizer", {}, (40, 40, 20, 64, 0)),
        # When the backward pass has ended, since one bucket is enough here: all gradients twice.
        ("gradients", {}, (40, 10, 20, 64, 2 * 40 - 64)),
        # In the last block's passes: its parameters and those before.
        ("full", {}, (10, 10, 20, 64, 2 * 10)),
        ("full", {"reshards": False}, (10, 10, 20, 64, 48 + 2 * 10 + 40 - 64)),
    ],
)
def test_memory_by_hand(shard: str, options: dict[str, Any], held: tuple[float, ...]) -> None:
    # On one host, where nothing is received into another tensor.
    assert predicted(setting(1, 4), shard, **options).memory == Memory(*(size * MB for size in held))


def test_blocks_are_small_and_whole_where_that_is_possible() -> None:
    def sizes(
        *gradients: tuple[float, ...], block_mb: float | None = None
    ) -> list[tuple[tuple[tuple[int, float], ...], tuple[int, ...]]]:
        plain = workload(blocks=len(gradients))
        pairs = zip(plain.blocks, gradients, strict=True)
        blocks = [dataclasses.replace(one, gradients=tuple(int(size * MIB) for size in own)) for one, own in pairs]
        found = gathered_blocks(dataclasses.replace(plain, blocks=tuple(blocks), block_mb=block_mb))
        return [(block.passes, block.gradients) for block in found]

    # Of 6 MiB a block has at most 1.
    assert sizes((0.4, 0.1), (0.4,), (0.6,), (4.5,)) == [
        (((0, 1.0), (1, 1.0)), (0, 1, 2)),
        (((2, 1.0),), (3,)),
        (((3, 1.0),), (4,)),
    ]
    # As many as were asked for.
    assert sizes((0.4, 0.1), (0.4,), (0.6,), (4.5,), block_mb=2.0) == [
        (((0, 1.0), (1, 1.0), (2, 1.0)), (0, 1, 2, 3)),
        (((3, 1.0),), (4,)),
    ]
    # What is too large is divided, with its passes; what has no parameters goes with what is before, or with the first.
    assert sizes((), (0.6, 0.6, 0.3), (), (0.5,)) == [
        (((0, 1.0), (1, 1 / 3)), (0,)),
        (((1, 2 / 3), (2, 1.0)), (1, 2)),
        (((3, 1.0),), (3,)),
    ]


def test_a_bucket_may_have_gradients_of_several_blocks() -> None:
    second, first = blocks_of_buckets(workload(), [[3, 2, 1], [0]])
    assert (second.gradients, second.held_bytes, dict(second.gradient_bytes_of)) == (
        (1, 2, 3),
        30 * MB,
        {1: 10 * MB, 2: 10 * MB, 3: 10 * MB},
    )
    assert first.gradient_bytes == 10 * MB


def test_candidates_divide_within_hosts_where_these_have_several_ranks() -> None:
    def keys(where: Setting) -> list[tuple[str, ...]]:
        return [tuple(one.keys.values())[1:] for one in candidates.predictions(where, ["fsdp"], ())]

    everywhere = [("optimizer",), ("gradients",), ("full",), ("full", "false")]
    assert keys(setting(4, 1)) == keys(setting(1, 4)) == everywhere
    assert keys(setting(2, 2)) == [*everywhere, ("full", "2")]
    assert keys(setting(1, 1)) == []
    # The size of blocks that a training names is planned in place of the usual one.
    assert keys(setting(block_mb=0.5)) == [*everywhere[:2], ("full", "0.5"), ("full", "0.5", "false")]


def test_sharpness_aware_steps_have_two_rounds() -> None:
    plain, twice = setting(), setting(rounds=2, sharpness_seconds=0.01)
    once = ddp.predict(plain, {}, sizes=(5, 5, 0))
    found = ddp.predict(twice, {}, sizes=(5, 5, 0))
    assert found.seconds == pytest.approx(2 * once.seconds + 0.01)
    assert found.bytes_sent == pytest.approx(2 * once.bytes_sent)
    # The parameters from before the second round.
    assert found.memory.total - once.memory.total == 40 * MB
    asked: dict[str, Any] = {"ranks": 2, "schedule": "gpipe", "microbatches": 4}
    once = pipeline.predict(plain, {}, **asked)
    found = pipeline.predict(twice, {}, **asked)
    # Each of two stages moves half of the parameters.
    assert found.seconds == pytest.approx(2 * once.seconds + 0.005)
    assert found.memory.total - once.memory.total == 20 * MB
    # What a step takes beyond its parts is once around both rounds.
    longer = twice.workload.with_step(16, 2 * 0.192 + 0.01 + 0.5)
    assert longer.outside_seconds(16) == pytest.approx(0.5)
