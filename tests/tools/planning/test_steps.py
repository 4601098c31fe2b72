"""Predicted steps against calculations by hand."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest

from distrain.compression.autotune.compressor_cost import BucketCost, CompressorCost
from distrain.errors import ConfigError
from distrain.gradients.bucket_sizes import DEFAULT_SIZES
from distrain.tools.planning import candidates, engine
from distrain.tools.planning.cluster import Link
from distrain.tools.planning.network import Network
from distrain.tools.planning.plan_keys import STRATEGIES
from distrain.tools.planning.prediction import Memory, Prediction
from distrain.tools.planning.steps import ddp, local_sgd, parameter_server, pipeline
from distrain.tools.planning.steps.common import Setting, backward_pieces, bucket_sizes
from distrain.tools.planning.workload import BlockMemory, at
from tests.tools.planning.workloads import ACCELERATOR, MB, cluster, workload


def setting(
    batch_size: int = 64, batchnorms: int = 0, latency: float = 0.0, bytes_per_second: float = 100.0 * MB
) -> Setting:
    machines = cluster(4, latency=latency, bytes_per_second=bytes_per_second)
    return Setting(workload(batch_size, batchnorms=batchnorms), machines, Network(machines))


def test_times_between_and_beyond_measured_numbers_of_samples() -> None:
    times = {4: 10.0, 8: 14.0}
    assert [at(times, samples) for samples in (4, 6, 8, 12)] == [10, 12, 14, 18]
    # The line would go to 6; a pass has a part that doesn't depend on the samples.
    assert at(times, 1) == 7
    assert at(times, 0) == 0
    assert at({4: 1.0, 8: 10.0}, 2) == 0.5


def test_ddp_waits_for_what_the_backward_pass_does_not_hide() -> None:
    # 16 samples a rank: 64 ms forward, 32 ms backward a block. A bucket of 10 MB takes 2 * 3/4 * 10 / 100 = 150 ms, so
    # the link is the bottleneck from the first bucket on: 64 + 32 + 4 * 150.
    predicted = ddp.predict(setting(), {}, sizes=(5, 5, 0))
    assert predicted.seconds == pytest.approx(0.064 + 0.032 + 0.6)
    assert predicted.bytes_sent == pytest.approx(4 * 15 * MB)
    assert predicted.same_as_single
    assert predicted.bound == "waiting"
    one_bucket = ddp.predict(setting(), {}, sizes=(1000, 1000, 0))
    assert one_bucket.seconds == pytest.approx(0.064 + 0.128 + 0.6)


def test_a_fast_link_hides_all_but_the_last_bucket() -> None:
    predicted = ddp.predict(setting(bytes_per_second=1000.0 * MB), {}, sizes=(5, 5, 0))
    assert predicted.seconds == pytest.approx(0.064 + 0.128 + 0.015)


def test_synchronised_batchnorm_pays_three_latencies_a_layer() -> None:
    slow = setting(batchnorms=2, latency=1e-3)
    together = ddp.predict(slow, {}, sizes=(1000, 1000, 0))
    apart = ddp.predict(slow, {}, sizes=(1000, 1000, 0), synchronised=False)
    # 8 layers, and 6 messages of a ring of 4.
    assert together.seconds - apart.seconds == pytest.approx(8 * 3 * 6e-3, rel=0.01)
    assert together.same_as_single
    assert not apart.same_as_single
    # Four latencies more for each of these collectives. What ranks wait for each other is part of the measured time.
    loose = dataclasses.replace(slow, cluster=dataclasses.replace(slow.cluster, spread=0.1))
    measured = dataclasses.replace(loose, workload=dataclasses.replace(slow.workload, batchnorm_latency=5.0))
    longer = ddp.predict(measured, {}, sizes=(1000, 1000, 0))
    assert longer.parts["waiting"] - together.parts["waiting"] == pytest.approx(4 * 8 * 3 * 6e-3, rel=0.01)
    assert longer.parts["stragglers"] < ddp.predict(loose, {}, sizes=(1000, 1000, 0)).parts["stragglers"] / 4


def test_accumulation_sends_only_in_the_last_pass() -> None:
    whole = setting()
    pieces = dataclasses.replace(whole, workload=dataclasses.replace(whole.workload, micro_batch_size=4))
    predicted = ddp.predict(pieces, {}, sizes=(5, 5, 0))
    # Three pieces of 48 ms; then 16 ms forward, 8 ms to the first bucket, and the link.
    assert predicted.seconds == pytest.approx(3 * 0.048 + 0.016 + 0.008 + 0.6)
    assert predicted.memory.activations == 4 * 4 * MB


def test_a_compressor_sends_less_and_works() -> None:
    # Measured on 2 ranks: an all-gather of 1 MB of each rank, and 100 ms of work.
    cost = CompressorCost([BucketCost([0.06, 0.04], [[("all_gather", MB)]])])
    plain = setting()
    training = dataclasses.replace(plain.workload, compressors={"topk": cost}, compressor_ranks=2)
    predicted = ddp.predict(dataclasses.replace(plain, workload=training), {}, compressor="topk", sizes=(1000, 1000, 0))
    assert predicted.bytes_sent == pytest.approx(3 * MB)
    # Four messages are decompressed instead of two.
    assert predicted.seconds == pytest.approx(0.064 + 0.128 + 0.06 + 2 * 0.04 + 0.03)
    assert predicted.parts["compression"] == pytest.approx(0.06 + 2 * 0.04)
    assert not predicted.same_as_single


def test_a_smaller_bucket_costs_a_compressor_less_but_not_in_proportion() -> None:
    whole = BucketCost([0.06, 0.04], [[("all_gather", 8 * MB)]])
    small = BucketCost([0.02, 0.01], [[("all_gather", 2 * MB)]])
    plain = setting().workload
    size = plain.gradient_bytes
    training = dataclasses.replace(
        plain, compressors={"topk": CompressorCost([whole, small])}, compressed_bytes=(size, size // 4)
    )
    half = training.compressor_cost("topk", 5 / 8 * size)
    assert half.work == pytest.approx([0.04, 0.025])
    assert half.collectives == [[("all_gather", 5 * MB)]]
    # Of tensors that are too small to be compressed.
    plain_sum = BucketCost([0.0, 0.001], [[("all_reduce", 2 * MB)]])
    mixed = dataclasses.replace(training, compressors={"topk": CompressorCost([whole, plain_sum])})
    assert mixed.compressor_cost("topk", 0.3 * size).collectives == [[("all_reduce", round(2.4 * MB))]]
    assert mixed.compressor_cost("topk", 0.9 * size).work == pytest.approx([0.054, 0.036])
    tiny = training.compressor_cost("topk", size / 8)
    assert tiny.work == small.work
    assert tiny.collectives == [[("all_gather", MB)]]
    # A model of which a sample was compressed: in proportion, whatever smaller buckets say.
    larger = training.compressor_cost("topk", 10 * size)
    assert larger.work == pytest.approx([10 * seconds for seconds in whole.work])
    assert larger.collectives == [[(kind, 10 * sent) for kind, sent in whole.collectives[0]]]


def test_a_compressor_of_two_phases_begins_the_second_one_before_the_next_bucket() -> None:
    cost = CompressorCost([BucketCost([0.0, 0.4, 0.0], [[("all_reduce", 8 * MB)], [("all_reduce", 8 * MB)]])])
    plain = setting()
    training = dataclasses.replace(plain.workload, compressors={"powersgd": cost}, compressor_ranks=2)
    where = dataclasses.replace(plain, workload=training)
    predicted = ddp.predict(where, {}, compressor="powersgd", sizes=(5, 5, 0))
    # 32 ms backward a bucket, 30 ms a collective, 100 ms between a bucket's two. At 64 ms the second bucket is ready;
    # then comes the first one's work, to 164. Its second collective ends at 194, the second bucket's first one at 224.
    # That one's work ends at 324, the next two collectives at 384; then 484, 544, and for the last bucket 644 and 674.
    assert predicted.seconds == pytest.approx(0.064 + 0.674)


def test_what_a_step_takes_beyond_its_parts_is_around_them() -> None:
    training = workload(64)
    samples = 16
    parts = training.forward_seconds(samples) + training.backward_seconds(samples)
    longer = training.with_step(samples, parts + 0.5)
    assert longer.outside_seconds(samples) == pytest.approx(0.5)
    assert longer.forward_seconds(samples) == training.forward_seconds(samples)
    shorter = training.with_step(samples, parts / 2)
    assert shorter.outside_seconds(samples) == 0
    assert shorter.forward_seconds(samples) == pytest.approx(training.forward_seconds(samples) / 2)


def test_layers_that_communicate_wait_for_the_buckets_before_them() -> None:
    def predicted(sizes: tuple[float, float, float], **options: Any) -> float:
        # Four gradients a block of 2.5 MB, each after 8 ms. A layer communicates after the third one.
        sequence = [
            dataclasses.replace(block, gradients=(MB * 5 // 2,) * 4, batchnorms=1, batchnorm_gradients=(1,))
            for block in workload().blocks
        ]
        machines = cluster(4, bytes_per_second=187.5 * MB)
        training = dataclasses.replace(workload(), blocks=tuple(sequence))
        where = Setting(training, machines, Network(machines))
        return ddp.predict(where, {}, sizes=sizes, **options).seconds

    # In one bucket, which is sent after the last layer, or in buckets of two gradients, which take 40 ms.
    whole, pairs = (1000.0, 1000.0, 0.0), (5.0, 5.0, 0.0)
    assert predicted(whole) == pytest.approx(predicted(whole, synchronised=False), rel=1e-3)
    # The link is busy from the first two gradients on.
    assert predicted(pairs, synchronised=False) == pytest.approx(0.064 + 0.016 + 8 * 0.04)
    # In each block it has nothing to do after the layer has waited for it, until the fourth gradient is there.
    assert predicted(pairs) == pytest.approx(0.064 + 0.016 + 8 * 0.04 + 4 * 0.008, rel=1e-2)


def test_local_sgd_pays_for_a_merge_every_few_steps() -> None:
    predicted = local_sgd.predict(setting(), {}, sync_every=10)
    assert predicted.seconds == pytest.approx(0.192 + 0.6 / 10)
    assert predicted.bytes_sent == pytest.approx(6 * MB)
    hidden = local_sgd.predict(setting(), {}, sync_every=10, overlap_steps=4)
    assert hidden.seconds == pytest.approx(0.192)
    # A merge has 6 rounds of a ring; the hashes of its result have 3, which are never hidden.
    slow = setting(latency=0.01)
    assert local_sgd.predict(slow, {}, sync_every=10).seconds == pytest.approx(0.192 + (0.6 + 0.09) / 10)
    assert local_sgd.predict(slow, {}, sync_every=10, overlap_steps=4).seconds == pytest.approx(0.192 + 0.03 / 10)


def test_late_merges_are_candidates_where_they_hide_a_wait() -> None:
    def overlaps(plain: Setting) -> list[tuple[str, str]]:
        found = candidates.predictions(plain, ["local_sgd"], ())
        keys = [prediction.keys for prediction in found]
        return [(one["strategy.sync_every"], one.get("strategy.overlap_steps", "0")) for one in keys]

    assert overlaps(setting(bytes_per_second=1e15)) == [(every, "0") for every in ("4", "16", "64")]
    # A merge takes 600 ms, a step 192. Of 64 steps, one hides too little of it.
    all_pairs = [(every, steps) for every in ("4", "16", "64") for steps in ("0", "1", "4")]
    assert overlaps(setting()) == [pair for pair in all_pairs if pair != ("64", "1")]


def test_a_merge_copies_and_hashes_the_parameters() -> None:
    plain = setting()
    training = dataclasses.replace(plain.workload, copy_seconds=0.01, digest_seconds=0.02)
    predicted = local_sgd.predict(dataclasses.replace(plain, workload=training), {}, sync_every=10)
    assert predicted.seconds == pytest.approx(0.192 + 0.06 + (13 * 0.01 + 0.02) / 10)
    # Anchor and difference; the copy of what is merged at once is gone before the next pass.
    assert (predicted.memory.activations, predicted.memory.other) == (64 * MB, 80 * MB)
    few = local_sgd.predict(setting(batch_size=4), {}, sync_every=10).memory
    assert (few.activations, few.other) == (25 * 2**20, 80 * MB)
    hidden = local_sgd.predict(setting(), {}, sync_every=10, overlap_steps=1).memory
    assert (hidden.activations, hidden.other) == (64 * MB, 80 * MB + 25 * 2**20)


def test_a_servers_link_carries_what_all_workers_send() -> None:
    predicted = parameter_server.predict(setting(batch_size=48), {}, servers=1)
    # 3 workers of 16 samples; 40 MB from each to the server, 3 * 100 ms a block, from the first complete one on; then
    # 120 MB back.
    assert predicted.seconds == pytest.approx(0.064 + 0.032 + 1.2 + 1.2)


def test_messages_to_servers_take_their_own_link() -> None:
    plain = setting(batch_size=48)
    machines = dataclasses.replace(plain.cluster, sockets=Link.of(0.0, 1000.0 * MB))
    predicted = parameter_server.predict(Setting(plain.workload, machines, Network(machines)), {}, servers=1)
    # 3 * 10 MB of a block take 30 ms, less than a backward pass of a block.
    assert predicted.seconds == pytest.approx(0.192 + 0.03 + 0.12)


def test_a_server_adds_up_copies_and_updates_while_its_workers_wait() -> None:
    plain = setting(batch_size=48, bytes_per_second=1e15)
    training = dataclasses.replace(plain.workload, copy_seconds=0.01, update_seconds=0.05)
    predicted = parameter_server.predict(dataclasses.replace(plain, workload=training), {}, servers=1)
    # A worker copies its gradients into messages and the answer into the model. The server: zeros, three messages of
    # 1.5 copies each, the update, three answers.
    assert predicted.seconds == pytest.approx(0.192 + 2 * 0.01 + (0.5 + 4.5 + 3) * 0.01 + 0.05)
    assert predicted.parts["update"] == pytest.approx(0.02)


def test_a_server_leaves_the_processors_to_its_workers() -> None:
    training = workload(batch_size=16)
    machines = dataclasses.replace(cluster(1, 3, bytes_per_second=1e15), slowdown=(1.0, 1.5, 2.0))
    predicted = parameter_server.predict(Setting(training, machines, Network(machines)), {}, servers=1)
    # Two workers of 8 samples compute; the third rank waits.
    assert predicted.seconds == pytest.approx(1.5 * 8 * 0.012, rel=1e-3)


def test_memory_of_workers_and_servers() -> None:
    # A worker: parameters, gradients, activations of 16 samples, the answer. A server of 6 workers: parameters,
    # gradients, state, six messages and six answers.
    small = parameter_server.predict(setting(batch_size=48), {}, servers=1).memory
    assert small.total == 40 * MB + 40 * MB + 80 * MB + 3 * 2 * 40 * MB
    large = parameter_server.predict(setting(batch_size=480), {}, servers=1).memory
    assert large.total == 3 * 40 * MB + 160 * 4 * MB


def test_frozen_parameters_are_held_but_not_sent() -> None:
    plain = setting()
    first, *others = plain.workload.blocks
    frozen = dataclasses.replace(first, gradients=(), state_bytes=10 * MB)
    training = dataclasses.replace(plain.workload, blocks=(frozen, *others))
    predicted = ddp.predict(dataclasses.replace(plain, workload=training), {}, sizes=(5, 5, 0))
    assert predicted.bytes_sent == pytest.approx(3 * 15 * MB)
    assert (predicted.memory.parameters, predicted.memory.gradients) == (40 * MB, 30 * MB)


@pytest.mark.parametrize("without", [0, 1, 3])
def test_a_block_without_gradients_delays_those_before(without: int) -> None:
    blocks = list(workload().blocks)
    blocks[without] = dataclasses.replace(blocks[without], gradients=())
    training = dataclasses.replace(workload(), blocks=tuple(blocks))
    pieces = backward_pieces(training, 10)
    # 20 ms a block, in the model's order; what comes before the first gradient belongs to it too.
    assert pieces == pytest.approx([0.04 if index == max(without - 1, 0) else 0.02 for index in range(3)])
    nothing = dataclasses.replace(training, blocks=(blocks[without],))
    assert backward_pieces(nothing, 10) == []


def test_a_slow_host_sets_the_pace_of_ddp() -> None:
    even = setting(bytes_per_second=1e15)
    machines = dataclasses.replace(even.cluster, relative_speeds=(1.0, 1.0, 0.5, 1.0))
    uneven = Setting(even.workload, machines, Network(machines))
    assert ddp.predict(uneven, {}).seconds == pytest.approx(2 * 0.192)


def test_replicas_wait_for_the_slowest_pipeline() -> None:
    even = setting(batch_size=32, bytes_per_second=1e15)
    # Hosts 2 and 3 are a replica; the stage on host 2 takes twice as long, which the one on host 3 must wait for.
    machines = dataclasses.replace(even.cluster, relative_speeds=(1.0, 1.0, 0.5, 1.0))
    uneven = Setting(even.workload, machines, Network(machines))
    # Four microbatches of four samples through two stages of two blocks: a stage's passes take 8 and 16 ms, or twice.
    assert predicted_pipeline(even).seconds == pytest.approx(5 * 0.024)
    assert predicted_pipeline(uneven).seconds == pytest.approx(5 * 0.048 - 0.024)


def test_chance_costs_more_the_more_ranks_wait_for_each_other() -> None:
    calm = setting(bytes_per_second=1e15)
    machines = dataclasses.replace(calm.cluster, spread=0.1)
    shaken = Setting(calm.workload, machines, Network(machines))
    assert ddp.predict(shaken, {}).parts["stragglers"] == pytest.approx(0.1 * 0.192 * 1.03, rel=0.03)
    # Deviations of 16 steps add up to four of one.
    assert local_sgd.predict(shaken, {}, sync_every=16).parts["stragglers"] == pytest.approx(
        0.1 * 0.192 * 1.03 / 4, rel=0.03
    )


def test_memory_of_a_pipeline_is_what_its_schedule_holds() -> None:
    slow = setting(batch_size=32)

    def memory(name: str) -> float:
        return pipeline.predict(slow, {}, ranks=4, schedule=name, microbatches=8).memory.activations

    # 4 samples a microbatch and 1 MB of each in a stage: all 8 microbatches, or as many as there are stages. Messages
    # have 0.1 MB a sample. The second stage holds those of all microbatches, received and sent, and two gradients that
    # are received ahead; under 1f1b the first stage holds all that it has sent.
    assert memory("gpipe") == pytest.approx((8 * 4 * 1.2 + 2 * 0.4) * MB)
    assert memory("1f1b") == pytest.approx((4 * 4 * 1.0 + 8 * 0.4 + 2 * 0.4) * MB)


def test_a_pipeline_holds_images_and_what_is_sent_once() -> None:
    def memory(**sizes: Any) -> Memory:
        plain = setting(batch_size=32)
        first, *others = plain.workload.blocks
        # Enough for the first rank to hold most.
        blocks = (dataclasses.replace(first, **{"activation_bytes": 2.0 * MB, **sizes}), *others)
        training = dataclasses.replace(plain.workload, blocks=blocks, input_bytes=0.25 * MB)
        asked: dict[str, Any] = {"ranks": 4, "schedule": "1f1b", "microbatches": 8}
        return pipeline.predict(dataclasses.replace(plain, workload=training), {}, **asked).memory

    # The images of the whole share are held all the time, so those of 4 microbatches that the stage saves are among
    # them, as the outputs that it saves of the same microbatches are among what it sends.
    assert memory().other == 32 * 0.25 * MB
    assert memory().activations - memory(saves_input=True).activations == pytest.approx(4 * 4 * 0.25 * MB)
    assert memory().activations - memory(saves_output=True).activations == pytest.approx(4 * 4 * 0.1 * MB)
    # What the pass of one microbatch needs besides.
    passing = {"deferred": BlockMemory(2.0 * MB, {4: 0.0}, {4: 3.0 * MB})}
    assert memory(memory=passing).activations - memory().activations == pytest.approx(3 * MB)


def predicted_pipeline(plain: Setting, microbatches: int = 4, **changed: Any) -> Prediction:
    training = dataclasses.replace(plain.workload, **changed)
    asked: dict[str, Any] = {"ranks": 2, "schedule": "gpipe", "microbatches": microbatches}
    return pipeline.predict(dataclasses.replace(plain, workload=training), {}, **asked)


def test_each_rank_of_a_pipeline_loads_the_whole_share() -> None:
    fast = setting(batch_size=32, bytes_per_second=1e15)
    loading = predicted_pipeline(fast, outside={1: 0.001, 16: 0.016})
    # 4 ranks are two pipelines; the last stage loads while the first one does.
    assert loading.seconds == pytest.approx(predicted_pipeline(fast).seconds + 0.016)
    assert loading.parts["update"] == pytest.approx(0.016)


def test_microbatches_are_no_larger_than_a_pass_may_be() -> None:
    fast = setting(batch_size=32, bytes_per_second=1e15)
    assert predicted_pipeline(fast, micro_batch_size=2).seconds == pytest.approx(
        predicted_pipeline(fast, microbatches=8).seconds
    )


def test_replicas_of_a_stage_add_up_the_statistics_of_its_batchnorm_layers() -> None:
    slow = setting(batch_size=32, batchnorms=1, latency=1e-3, bytes_per_second=1e15)
    fewer = dataclasses.replace(slow, workload=workload(32, batchnorms=0))
    # Two layers a stage; an all-reduce of two replicas is two messages.
    difference = predicted_pipeline(slow).seconds - predicted_pipeline(fewer).seconds
    assert difference == pytest.approx(2 * 2e-3)
    assert predicted_pipeline(slow, deferred_factor=1.5).parts["compute"] == pytest.approx(
        1.5 * predicted_pipeline(slow).parts["compute"]
    )


def test_a_stage_sends_its_tensors_one_after_the_other() -> None:
    slow = setting(batch_size=2, latency=1e-3, bytes_per_second=1e15)
    several = tuple(dataclasses.replace(block, output_tensors=3) for block in slow.workload.blocks)
    # There and back.
    assert predicted_pipeline(slow, blocks=several, microbatches=1).seconds == pytest.approx(
        predicted_pipeline(slow, microbatches=1).seconds + 2 * 2e-3
    )


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_all_candidates_of_a_world_are_predicted(ranks: int) -> None:
    machines = cluster(ranks)
    training = workload(blocks=8)
    found = list(candidates.predictions(Setting(training, machines, Network(machines)), STRATEGIES, ()))
    strategies = {prediction.keys["strategy"] for prediction in found}
    # Layers were not divided, and 2 or 3 ranks are no mesh.
    assert strategies - {"mesh"} == {"ddp", "fsdp", "pipeline", "local_sgd", "parameter_server"}
    assert ("mesh" in strategies) == (ranks > 3)
    for prediction in found:
        assert prediction.seconds > 0
        assert prediction.memory.total > 0
    keys = [tuple(prediction.keys.items()) for prediction in found]
    assert len(keys) == len(set(keys))


def test_microbatches_that_a_run_would_make_smaller_are_listed_once() -> None:
    training = dataclasses.replace(workload(batch_size=64), micro_batch_size=8)
    machines = cluster(2)
    found = candidates.predictions(Setting(training, machines, Network(machines)), ["pipeline"], ())
    keys = [prediction.keys for prediction in found if prediction.keys["strategy.schedule"] == "1f1b"]
    assert [own["strategy.microbatches"] for own in keys] == ["8", "16"]


def test_sizes_of_buckets_that_make_no_difference_are_listed_once() -> None:
    def listed(parameters: int) -> list[tuple[str, ...]]:
        blocks = tuple(dataclasses.replace(block, gradients=(parameters * MB,)) for block in workload().blocks)
        training = dataclasses.replace(workload(), blocks=blocks)
        # A slow link, so that a run chooses several buckets.
        machines = cluster(4, bytes_per_second=1.0 * MB)
        found = candidates.predictions(Setting(training, machines, Network(machines)), ["ddp"], ())
        return [tuple(prediction.keys.values()) for prediction in found]

    # All 16 MB fit into 25 MiB.
    assert listed(4) == [("ddp",), ("ddp", "1024", "1024")]
    # Each of 30 MB is a bucket by itself, as in the run's own choice.
    assert listed(30) == [("ddp",), ("ddp", "1024", "1024")]
    # Two of 12 MB fit into 25 MiB, and the run's buckets have a quarter of the model.
    assert listed(12) == [("ddp",), ("ddp", "1024", "1024"), ("ddp", "25", "25")]


@pytest.mark.parametrize("strategy", ["single", "ddp"])
def test_strategies_that_cannot_run_here_are_named(strategy: str) -> None:
    with pytest.raises(ConfigError, match=f"strategies={strategy}: can't divide .* a batch of 2 samples among 4 ranks"):
        engine.predict(workload(batch_size=2), cluster(4), engine.Options(strategies=(strategy,)))


def test_what_does_not_fit_is_not_the_best() -> None:
    machines = dataclasses.replace(cluster(4), memory_bytes=100.0 * MB)
    plan = engine.predict(workload(), machines, engine.Options())
    best = plan.best(same_as_single=True)
    assert best is not None
    assert best.keys["strategy"] == "pipeline"
    assert best.memory.total <= 100 * MB
    nothing = dataclasses.replace(plan, cluster=dataclasses.replace(machines, memory_bytes=1.0 * MB))
    assert "nothing fits into 1 MB a rank" in "\n".join(nothing.lines())


def test_a_thousand_hosts_are_planned_as_fast_as_two() -> None:
    def seconds(hosts: int) -> tuple[float, list[Prediction]]:
        begin = time.process_time()
        training = workload(batch_size=8 * hosts, blocks=8)
        found = engine.predict(training, cluster(hosts, 8), engine.Options()).predictions
        return time.process_time() - begin, list(found)

    seconds(1024)  # finds the schedules
    few, _ = seconds(2)
    many, found = seconds(1024)
    # The same ranks are simulated; a larger cluster only has more sizes of pipelines.
    assert many < 5 * few + 0.1
    assert found[0].seconds > 0


def test_64_hosts_of_8_devices_by_hand() -> None:
    machines = dataclasses.replace(
        cluster(64, 8, latency=10e-6, bytes_per_second=50_000.0 * MB), accelerator=ACCELERATOR
    )
    training = workload(batch_size=512 * 32).on(ACCELERATOR)
    predicted = ddp.predict(Setting(training, machines, Network(machines, "flat")), {}, sizes=(5, 5, 0))
    # 32 samples a device. Forward of a block: 32 GFLOP at 100 TFLOP/s, 0.32 ms, which is longer than moving 77.2 MB at
    # 2 TB/s. Backward: twice as long.
    forward, backward = 4 * 0.32e-3, 4 * 0.64e-3
    # A bucket of 10 MB: a ring over 512 devices sends 20 MB in 1022 messages, 0.4 + 10.22 ms; a tree sends 20 MB in 18
    # messages: 0.4 + 0.18 ms, less than the backward pass of a block. So all but the last bucket is hidden.
    bucket = 20e6 / 50e9 + 18 * 10e-6
    # Parameter and gradient three times, the state twice, at 2 TB/s.
    update = (3 * 40e6 + 2 * 80e6) / 2e12
    assert predicted.seconds == pytest.approx(forward + backward + bucket + update, rel=0.01)


def test_buckets_of_a_deterministic_training_are_not_chosen_by_measurement() -> None:
    plain = setting()
    fixed = dataclasses.replace(plain, workload=dataclasses.replace(plain.workload, deterministic=True))
    group = plain.network.group(4)
    assert bucket_sizes(fixed, group) == DEFAULT_SIZES != bucket_sizes(plain, group)
    assert bucket_sizes(fixed, group, (2.0, None, 3.0)) == (2.0, DEFAULT_SIZES.other, 3.0)


def test_memory_on_its_way_and_of_the_optimizer_counts() -> None:
    plain = setting().workload
    memory = [{"plain": BlockMemory(MB, {1: 1.0 * extra * MB})} for extra in (9, 0, 2, 1)]
    pairs = zip(plain.blocks, memory, strict=True)
    blocks = tuple(dataclasses.replace(block, memory=own) for block, own in pairs)
    training = dataclasses.replace(plain, blocks=blocks)
    # After the first block 1 + 9, after the third one 3 + 2 MB a sample, after the last one 4 + 1.
    assert training.activation_bytes(2) == training.activation_bytes(2, "deferred") == 2 * 10 * MB
    assert Setting(training, cluster(2), Network(cluster(2))).memory(3.0 * MB).activations == 3 * MB
    updating = dataclasses.replace(training, update_bytes=7.0 * MB)
    assert Setting(updating, cluster(2), Network(cluster(2))).memory(3.0 * MB).activations == 7 * MB
