"""Predicted steps of meshes against calculations by hand, and which meshes are tried."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from distrain.tools.planning import candidates, engine, figure
from distrain.tools.planning.cluster import Link, expected_maximum
from distrain.tools.planning.network import Group, Network
from distrain.tools.planning.prediction import Memory, Prediction
from distrain.tools.planning.steps import ddp, fsdp, pipeline
from distrain.tools.planning.steps.common import Setting
from distrain.tools.planning.steps.shape import Shape
from distrain.tools.planning.workload import DividedModel
from tests.tools.planning.workloads import ACCELERATOR, MB, cluster, workload


def halved(ranks: int = 2, starts: tuple[int, ...] = (0,)) -> DividedModel:
    """Of each block half of the work and of the 10 MB; a sum of 0.1 MB a sample forward, and one backward."""
    blocks = tuple(
        dataclasses.replace(
            block.times(0.5),
            gradients=(5 * MB,),
            activation_bytes=MB / 2,
            flops=0.5e9,
            forward_sums=(0.1 * MB,),
            backward_sums=(0.1 * MB,),
        )
        for block in workload().blocks
    )
    return DividedModel(ranks, blocks, update_seconds=0.01, optimizer_bytes=40.0 * MB, starts=starts)


def setting(hosts: int, per_host: int, between: float = 100.0 * MB, within: float = 1e15, **changed: Any) -> Setting:
    machines = dataclasses.replace(cluster(hosts, per_host, bytes_per_second=between), within=Link.of(0.0, within))
    divided = (halved(), halved(starts=(0, 2)))
    training = dataclasses.replace(workload(batch_size=32), **{"divided": divided, **changed})
    return Setting(training, machines, Network(machines))


def test_replicas_that_divide_layers_by_hand() -> None:
    # Two hosts with a replica of two ranks each: 16 samples a replica, of which a rank computes half of each layer.
    # A sum of 1.6 MB between two ranks sends 1.6 MB at 100 MB/s: 16 ms, in each of four blocks, forward and backward.
    found = ddp.predict(setting(2, 2, within=100.0 * MB), {}, sizes=(2, 2, 0), tensor=2)
    # A block takes 8 ms forward and 16 backward, its bucket of 5 MB between hosts, which both ranks of a host send at
    # once, 100 ms. The link is busy from the first bucket on, which is complete after the last block's backward pass.
    assert found.seconds == pytest.approx(4 * (0.008 + 0.016) + (0.016 + 0.016) + 4 * 0.1 + 0.01)
    assert found.bytes_sent == pytest.approx((8 * 1.6 + 4 * 5) * MB)
    assert found.memory == Memory(20 * MB, 20 * MB, 40 * MB, 32 * MB)
    assert found.same_as_single
    # Sums wait for the slower of two ranks, and at its end a step for the slower of two replicas.
    machines = dataclasses.replace(cluster(2, 2), spread=0.1)
    shaken = ddp.predict(dataclasses.replace(setting(2, 2), cluster=machines), {}, tensor=2)
    chance = 0.1 * (4 * 0.024 + 0.01) * expected_maximum(2)
    assert shaken.parts["stragglers"] == pytest.approx(chance * (8**0.5 + 1))


def test_sums_of_divided_layers_are_as_late_in_passes_as_collectives_of_batchnorm_layers() -> None:
    machines = dataclasses.replace(cluster(2, 1, latency=1e-3), spread=0.1)
    training = dataclasses.replace(workload(batch_size=32), divided=(halved(),))
    alone = Setting(training, machines, Network(machines))
    plain = ddp.predict(alone, {}, tensor=2)
    late = dataclasses.replace(alone, workload=dataclasses.replace(training, batchnorm_latency=5.0))
    found = ddp.predict(late, {}, tensor=2)
    # Four times two messages for each of eight sums. What ranks wait for each other is part of that.
    assert found.parts["waiting"] - plain.parts["waiting"] == pytest.approx(8 * 4 * 2e-3, rel=0.01)
    assert found.parts["stragglers"] == 0 < plain.parts["stragglers"]


def test_replicas_that_divide_layers_and_share_their_update_by_hand() -> None:
    found = fsdp.predict(setting(2, 2), {}, shard="gradients", tensor=2)
    # The gradients of a block, of which each rank sends half, take both ranks of a host 50 ms; so do its parameters.
    # The link is busy from the first gradients on.
    assert found.seconds == pytest.approx(0.032 + 0.016 + 4 * 0.05 + 0.01 / 2 + 4 * 0.05)
    assert found.bytes_sent == pytest.approx((8 * 1.6 + 10 + 10) * MB)
    assert (found.memory.parameters, found.memory.gradients, found.memory.optimizer) == (20 * MB, 10 * MB, 20 * MB)
    # The block that a forward pass needs next is gathered while layers are summed.
    full = fsdp.predict(setting(2, 2), {}, shard="full", tensor=2)
    assert full.memory.parameters == 10 * MB


def predicted(where: Setting, microbatches: int = 2, **options: Any) -> Prediction:
    asked: dict[str, Any] = {"ranks": 2, "schedule": "1f1b", "microbatches": microbatches, **options}
    return pipeline.predict(where, {}, **asked)


def test_stages_that_divide_layers_by_hand() -> None:
    # Two hosts, on each of which two ranks divide a stage of two blocks: a microbatch of 16 samples takes 16 ms forward
    # and 32 backward, and its sums 2 * 16 ms each way.
    found = predicted(setting(2, 2, between=1e15, within=100.0 * MB), tensor=2)
    assert found.seconds == pytest.approx(3 * (0.016 + 0.032 + 4 * 0.016) + 0.005)
    # Two microbatches: sums, and activations or their gradients of 1.6 MB.
    assert found.bytes_sent == pytest.approx(2 * (4 + 1) * 1.6 * MB)
    assert found.memory.parameters == 10 * MB
    assert found.same_as_single
    # Both ranks of a host send their copies to the other host at the same time, and the first stage waits for them.
    slow = predicted(setting(2, 2), tensor=2)
    assert slow.seconds == pytest.approx(3 * 0.048 + 2 * 2 * 0.016 + 0.005)


def test_stages_whose_replicas_share_their_update_by_hand() -> None:
    plain = setting(4, 1, update_seconds=0.08)
    copied, shared = predicted(plain), predicted(plain, shard=2)
    # Of 20 MB a stage all are added up, in 200 ms; or half is scattered and half gathered.
    assert copied.seconds - shared.seconds == pytest.approx(0.04 - 0.02)
    assert copied.bytes_sent == pytest.approx(shared.bytes_sent)
    # While microbatches follow each other, a rank has all gradients of its stage.
    assert (shared.memory.gradients, shared.memory.optimizer) == (10 * MB, 20 * MB)
    assert shared.memory.other - copied.memory.other == 20 * MB
    # Four replicas of one host, two in each group: the parts of 10 MB are added up over both groups, too.
    eight = setting(1, 8, within=100.0 * MB)
    assert predicted(eight, shard=2).bytes_sent - predicted(eight, shard=4).bytes_sent == pytest.approx(
        (10 + 10 + 10 - 15 - 15) * MB
    )


def test_a_slow_host_delays_the_stages_that_have_ranks_on_it() -> None:
    def seconds(*speeds: float) -> float:
        where = setting(4, 1, between=1e15, within=1e15)
        machines = dataclasses.replace(where.cluster, relative_speeds=speeds)
        return predicted(Setting(where.workload, machines, where.network), tensor=2).parts["compute"]

    assert seconds(1.0, 1.0, 0.5, 1.0) == pytest.approx(seconds(1.0, 1.0, 0.5, 0.5))
    assert seconds(1.0, 1.0, 0.5, 1.0) > 1.3 * seconds(1.0, 1.0, 1.0, 1.0)


def test_groups_lie_within_hosts_or_between_them_as_ranks_are_placed() -> None:
    network = Network(cluster(4, 4))
    shape = Shape(data=2, shard=2, pipeline=2, tensor=2)
    assert shape.layers_group(network) == Group(1, 2)
    # A host has a replica; the same part of it is on all four hosts.
    assert shape.replicas_group(network) == Group(4, 1, 4)
    assert shape.shard_group(network) == shape.data_group(network) == Group(2, 1, 4)
    small = Shape(data=4, shard=2, tensor=2)
    assert (small.shard_group(network), small.data_group(network)) == (Group(1, 2), Group(4, 1, 4))


def test_64_hosts_of_8_devices_that_divide_layers_by_hand() -> None:
    machines = dataclasses.replace(
        cluster(64, 8, latency=10e-6, bytes_per_second=50_000.0 * MB),
        within=Link.of(5e-6, 250_000.0 * MB),
        accelerator=ACCELERATOR,
    )
    training = dataclasses.replace(workload(batch_size=64 * 256), divided=(halved(8),)).on(ACCELERATOR)
    where = Setting(training, machines, Network(machines, "flat"))
    predicted = ddp.predict(where, {}, sizes=(2, 2, 0), tensor=8)
    # 256 samples a host, of which a device computes its part of each layer. Forward of a block: 128 GFLOP at 100
    # TFLOP/s, 1.28 ms; it moves 256 * 1.1 MB and 5 MB at 2 TB/s, which takes 0.14 ms. Backward: twice as long.
    compute = 4 * (1.28e-3 + 2.56e-3)
    # A sum of 25.6 MB within a host: a ring of 8 sends 44.8 MB in 14 messages, 0.179 + 0.07 ms; a tree sends 51.2 MB in
    # 6 messages, 0.205 + 0.03 ms, which is less. Two in each block, and nothing is computed meanwhile.
    sums = 8 * (51.2e6 / 250e9 + 6 * 5e-6)
    # A bucket of 5 MB between 64 hosts, on whose links the 8 devices of a host share: a tree sends 10 MB in 12
    # messages, 8 * 0.2 + 0.12 ms, less than a block's backward pass. All but the last bucket is hidden.
    bucket = 8 * 10e6 / 50e9 + 12 * 10e-6
    # Parameter and gradient three times, the state twice, at 2 TB/s.
    update = (3 * 20e6 + 2 * 40e6) / 2e12
    assert predicted.seconds == pytest.approx(compute + sums + bucket + update, rel=0.01)
    assert predicted.parts["compute"] == pytest.approx(compute)
    assert predicted.parts["waiting"] == pytest.approx(sums + bucket, rel=0.01)


@pytest.mark.parametrize(
    ("hosts", "per_host", "shapes"),
    [
        (1, 2, set()),
        (3, 1, set()),
        # On one host, and on several with a rank each.
        (1, 4, {(1, 1, 2, 2), (2, 1, 2, 1), (1, 2, 2, 1), (2, 1, 1, 2), (1, 2, 1, 2)}),
        (4, 1, {(1, 1, 2, 2), (2, 1, 2, 1), (1, 2, 2, 1), (2, 1, 1, 2), (1, 2, 1, 2)}),
        # Layers are divided within a host, and hosts are replicas of each other.
        (2, 3, {(2, 3, 1, 1), (3, 1, 2, 1), (1, 3, 2, 1), (2, 1, 1, 3), (1, 2, 1, 3), (1, 1, 2, 3)}),
    ],
)
def test_few_meshes_are_tried(hosts: int, per_host: int, shapes: set[tuple[int, ...]]) -> None:
    found = [dataclasses.astuple(shape) for shape in candidates.mesh_shapes(cluster(hosts, per_host))]
    assert set(found) == shapes
    assert len(found) == len(shapes)


def test_meshes_of_three_dimensions_are_tried_on_eight_ranks_and_more() -> None:
    for hosts, per_host in ((1, 8), (64, 8), (1024, 8)):
        shapes = list(candidates.mesh_shapes(cluster(hosts, per_host)))
        assert Shape(data=hosts * per_host // 4, pipeline=2, tensor=2) in shapes
        assert Shape(shard=hosts * per_host // 4, pipeline=2, tensor=2) in shapes
        assert len(shapes) < 30
        assert all(shape.replicas * shape.ranks_of_replica == hosts * per_host for shape in shapes)


def test_candidates_are_typed_as_a_mesh_and_once() -> None:
    where = setting(2, 2)
    found = [
        " ".join(f"{key}={value}" for key, value in one.keys.items()) for one in candidates.of_strategy("mesh", where)
    ]
    beginnings = [
        "strategy=mesh strategy.mesh.data=2 strategy.mesh.shard=2 strategy.shard=full",
        "strategy=mesh strategy.mesh.data=2 strategy.mesh.pipeline=2 strategy.schedule=1f1b strategy.microbatches=",
        "strategy=mesh strategy.mesh.shard=2 strategy.mesh.pipeline=2 strategy.shard=gradients strategy.schedule=1f1b",
        "strategy=mesh strategy.mesh.data=2 strategy.mesh.tensor=2",
        "strategy=mesh strategy.mesh.shard=2 strategy.mesh.tensor=2 strategy.shard=gradients",
        "strategy=mesh strategy.mesh.pipeline=2 strategy.mesh.tensor=2 strategy.schedule=1f1b strategy.microbatches=",
    ]
    for beginning in beginnings:
        assert any(one.startswith(beginning) for one in found), beginning

    def dimensions(*strategies: str) -> set[tuple[str, ...]]:
        predictions = candidates.predictions(where, strategies, ())
        keys = [[key for key in one.keys if key.startswith("strategy.mesh.")] for one in predictions]
        return {tuple(key.rpartition(".")[2] for key in one) for one in keys if one}

    alone = dimensions("mesh")
    # What a strategy of one dimension does by itself is listed under its name.
    assert alone - dimensions("mesh", "pipeline", "fsdp") == {("data", "pipeline"), ("data", "shard")}
    unknown = setting(2, 2, divided=())
    assert all("tensor" not in " ".join(one.keys) for one in candidates.of_strategy("mesh", unknown))


def test_a_mesh_predicts_what_its_strategy_of_one_dimension_does() -> None:
    where = setting(2, 2)
    for other in ("pipeline", "fsdp"):
        meshes = [one for one in candidates.of_strategy("mesh", where) if one.same_as == other]
        plain = [dataclasses.replace(one.predict(where), keys={}) for one in candidates.of_strategy(other, where)]
        assert meshes
        assert all(dataclasses.replace(one.predict(where), keys={}) in plain for one in meshes)


def test_layers_are_divided_in_each_way_that_is_tried() -> None:
    def wanted(*strategies: str, **changed: Any) -> list[tuple[int, list[int]]]:
        return candidates.divisions(setting(1, 8, divided=(), **changed), strategies)

    assert wanted("ddp", "pipeline") == []
    assert wanted("tensor_parallel") == [(8, [0])]
    # Four blocks that take the same time.
    assert wanted("mesh") == [(2, [0]), (2, [0, 2]), (2, [0, 1, 2, 3])]
    assert wanted("mesh", "tensor_parallel") == [*wanted("mesh"), (8, [0])]
    # A batch of two samples has two replicas at most.
    assert wanted("mesh", batch_size=2) == [(2, [0, 2]), (2, [0, 1, 2, 3])]


def test_meshes_are_in_the_plan_and_in_its_pictures() -> None:
    where = setting(2, 4)
    made = engine.predict(where.workload, where.cluster, engine.Options(strategies=("ddp", "mesh")))
    assert any(one.keys["strategy"] == "mesh" for one in made.predictions)
    assert any("strategy=mesh strategy.mesh." in line for line in made.lines())
    curves = {one.strategy: one.hosts for one in figure.curves(where.workload, where.cluster, 4, ("ddp", "mesh"))}
    assert curves["mesh"] == [1, 2, 4]
    staged = [one for one in made.predictions if "strategy.mesh.tensor" in one.keys and one.bubble is not None]
    drawn = figure.draw_step(staged)
    assert drawn is not None
    assert "2 stages on 4 ranks" in "".join(text.get_text() for axes in drawn.axes for text in [axes.title])
