"""Predicted steps of ``tensor_parallel`` against calculations by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from distrain.tools.planning import candidates
from distrain.tools.planning.cluster import expected_maximum
from distrain.tools.planning.network import Network
from distrain.tools.planning.prediction import Memory, Prediction
from distrain.tools.planning.steps import ddp
from distrain.tools.planning.steps.common import Setting
from distrain.tools.planning.workload import BlockProfile, DividedModel
from tests.tools.planning.workloads import ACCELERATOR, MB, cluster, workload

#: What each of four ranks has: 1 ms forward and 2 ms backward a sample, 12 MB; two sums of 0.1 MB a sample.
BLOCK = BlockProfile(
    "model",
    (12 * MB,),
    {1: 1e-3, 10: 10e-3},
    {1: 2e-3, 10: 20e-3},
    activation_bytes=2 * MB,
    flops=1e9,
    forward_sums=(0.1 * MB,),
    backward_sums=(0.1 * MB,),
)
DIVIDED = DividedModel(4, (BLOCK,), update_seconds=0.01, optimizer_bytes=24.0 * MB)


def setting(hosts: int = 4, **changed: Any) -> Setting:
    machines = cluster(hosts)
    training = dataclasses.replace(workload(), **{"divided": (DIVIDED,), **changed})
    return Setting(training, machines, Network(machines))


def predicted(where: Setting) -> Prediction:
    return ddp.predict(where, {}, tensor=4)


def test_a_step_by_hand() -> None:
    found = predicted(setting(outside={1: 1e-3, 10: 10e-3}))
    # 64 samples are loaded and run on every rank. In a ring of 4, a sum of 6.4 MB sends 9.6 MB at 100 MB/s.
    assert found.seconds == pytest.approx(0.064 + 0.064 * 3 + 2 * 0.096 + 0.01)
    assert found.bytes_sent == pytest.approx(2 * 9.6 * MB)
    assert found.parts["waiting"] == pytest.approx(0.192)
    assert found.memory == Memory(12 * MB, 12 * MB, 24 * MB, 128 * MB)
    assert found.same_as_single


def test_pieces_and_rounds() -> None:
    once = predicted(setting())
    pieces = predicted(setting(micro_batch_size=16))
    assert pieces.seconds == pytest.approx(once.seconds)
    assert pieces.memory.activations == 32 * MB
    twice = predicted(setting(rounds=2, sharpness_seconds=0.04))
    # A rank moves its 12 of 40 MB.
    assert twice.seconds == pytest.approx(2 * (once.seconds - 0.01) + 0.01 + 0.04 * 12 / 40)
    assert twice.memory.other == 12 * MB


def test_sums_wait_for_the_slowest_rank() -> None:
    machines = dataclasses.replace(cluster(4), spread=0.1)
    where = dataclasses.replace(setting(), cluster=machines)
    computed = 0.064 * 3 + 0.01
    assert predicted(where).parts["stragglers"] == pytest.approx(0.1 * computed * expected_maximum(4) * 2**0.5)


def test_other_numbers_of_ranks_divide_in_other_ways() -> None:
    def count(where: Setting) -> int:
        return len(list(candidates.predictions(where, ["tensor_parallel"], ())))

    assert [count(setting(4)), count(setting(8)), count(setting(4, divided=()))] == [1, 0, 0]


def test_times_are_scaled_with_those_of_the_whole_model() -> None:
    plain = setting().workload
    faster = plain.with_step(64, plain.forward_seconds(64) * 1.5)
    assert faster.divided[0].blocks[0].forward[10] == pytest.approx(5e-3)
    (there,) = plain.on(ACCELERATOR).divided
    assert there.blocks[0].forward[64] == pytest.approx(64 * 1e9 / 100e12)
    assert there.update_seconds == pytest.approx((3 * 12 + 2 * 24) * MB / 2e12)
