"""The simulated clock: shared processors, transfers in turn, and the schedules of pipelines."""

from __future__ import annotations

import pytest

from distrain.strategies.pipeline import schedule as schedules
from distrain.strategies.pipeline.timeline import chrome_trace, measured_bubble
from distrain.tools.planning.cluster import Link, TokenBucket
from distrain.tools.planning.network import Duration, Network
from distrain.tools.planning.simulation import Compute, Operation, Simulated, Start, Wait, simulate
from distrain.tools.planning.steps import pipeline
from distrain.tools.planning.steps.common import Setting
from tests.tools.planning.workloads import cluster, workload


def alone(computing: int) -> float:
    return 1.0


def turns(computing: int) -> float:
    return float(computing)


def run(*programs: list[Operation], machines: list[int] | None = None, shared: bool = False) -> Simulated:
    return simulate(programs, machines or list(range(len(programs))), turns if shared else alone)


def test_ranks_of_one_machine_share_its_processor() -> None:
    # Both compute until 4; then the second one has the processor for itself.
    simulated = run([Compute("forward", 2)], [Compute("forward", 5)], machines=[0, 0], shared=True)
    assert simulated.seconds == pytest.approx(7)
    assert [lane[0].end for lane in simulated.lanes] == pytest.approx([4, 7])


def test_a_rank_stands_for_others_that_compute_at_the_same_time() -> None:
    programs = [[Compute("forward", 2)], [Compute("update", 2)]]
    # Three compute on one machine until 6; all end then.
    simulated = simulate(programs, [0, 0], turns, alike=[2, 1])
    assert simulated.seconds == pytest.approx(6)
    assert simulated.computed == [{"forward": pytest.approx(6)}, {"update": pytest.approx(6)}]
    assert [len(lane) for lane in simulated.lanes] == [1, 0]


def test_a_rank_that_waits_leaves_the_processor_to_others() -> None:
    transfer = Duration(3, 0, 10)
    simulated = run(
        [Compute("forward", 1), Start("a", transfer, 1, "link"), Wait("a"), Compute("backward", 1)],
        [Compute("forward", 4)],
        machines=[0, 0],
        shared=True,
    )
    # 0 to 2: both; 2 to 5: the second alone, which is done; 5 to 6: the first one.
    assert simulated.seconds == pytest.approx(6)
    assert simulated.waited == pytest.approx([3, 0])
    assert simulated.sent == [10, 0]


def test_transfers_of_a_channel_come_one_after_the_other() -> None:
    one = Duration(2)
    same = run([Start("a", one, 1, "x"), Start("b", one, 1, "x"), Wait("a"), Wait("b")])
    other = run([Start("a", one, 1, "x"), Start("b", one, 1, "y"), Wait("a"), Wait("b")])
    assert (same.seconds, other.seconds) == (4, 2)


def test_two_transfers_share_a_channel_while_one_leaves_its_link_idle() -> None:
    # 4 s of latency and 1 s of bytes each: the second one's bytes follow those of the first one, the third one waits
    # for the end of the first one.
    one = Duration(5, idle_seconds=4)
    names = ("a", "b", "c")
    waits = [Wait(name) for name in names]
    assert run([*(Start(name, one, 1, "x") for name in names[:2]), *waits[:2]]).seconds == pytest.approx(6)
    assert run([*(Start(name, one, 1, "x") for name in names), *waits]).seconds == pytest.approx(10)


def test_a_collective_begins_when_the_last_rank_has_started_it() -> None:
    one = Duration(2)
    simulated = run([Start("a", one, 2, "x"), Wait("a")], [Compute("forward", 5), Start("a", one, 2, "x"), Wait("a")])
    assert simulated.seconds == 7
    assert simulated.waited == [7, 2]


def test_computation_is_delayed_by_the_processors_part_of_a_transfer() -> None:
    busy = Duration(4, 1)
    hidden = run([Start("a", busy, 1, "x"), Compute("backward", 10), Wait("a")])
    assert hidden.seconds == 11
    waiting = run([Start("a", busy, 1, "x"), Wait("a"), Compute("update", 10)])
    assert waiting.seconds == 14


def test_a_token_bucket_lets_pass_at_once_what_arrived_while_ranks_computed() -> None:
    # 10 bytes a second, at most 40 kept. Without pauses the message would take 3 s.
    bucket = TokenBucket(10, 40, Link.of(0.5, 1e15))
    sends = Duration(3.5, 0, 30, fast_seconds=0.5, between=30)

    def step(computes: float) -> float:
        program: list[Operation] = [Compute("forward", computes), Start("a", sends, 1, "x"), Wait("a")]
        return simulate([program], [0], alone, bucket=bucket).seconds

    # Tokens for all 30 bytes arrive in 3 s; in shorter steps they are what the step waits for.
    assert step(5) == pytest.approx(5.5)
    assert step(1) == pytest.approx(3, rel=0.05)


def test_a_message_larger_than_the_token_bucket_waits_for_the_rest() -> None:
    bucket = TokenBucket(10, 40, Link.of(0.5, 1e15))
    sends = Duration(10.5, 0, 100, fast_seconds=0.5, between=100)
    simulated = simulate([[Compute("forward", 100), Start("a", sends, 1, "x"), Wait("a")]], [0], alone, bucket=bucket)
    assert simulated.seconds == pytest.approx(100 + 6)


def test_two_transfers_at_once_use_the_same_tokens() -> None:
    bucket = TokenBucket(10, 40, Link.of(0.5, 1e15))
    one = Duration(6.5, 0, 60, fast_seconds=0.5, between=60, idle_seconds=0.4)
    program: list[Operation] = [Start("a", one, 1, "x"), Start("b", one, 1, "x"), Wait("a"), Wait("b")]
    # 120 bytes a step, and 10 tokens a second.
    assert simulate([program], [0], alone, bucket=bucket).seconds == pytest.approx(12, rel=0.01)


def test_programs_that_wait_for_each_other_are_an_error() -> None:
    with pytest.raises(ValueError, match="wait for each other"):
        run([Wait("b")], [Wait("a")])


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_a_pipeline_takes_as_long_as_its_schedule(name: str) -> None:
    schedule = schedules.SCHEDULES[name]
    per_rank, ranks, microbatches = schedule.stages_per_rank or 2, 2, 4
    training = workload(batch_size=4, blocks=4)
    machines = cluster(ranks, bytes_per_second=1e15)
    predicted = pipeline.predict(
        Setting(training, machines, Network(machines)),
        {},
        ranks=ranks,
        schedule=name,
        microbatches=microbatches,
        stages_per_rank=per_rank,
    )
    order = schedules.actions_of_ranks(schedule, ranks, per_rank, microbatches)
    blocks = 4 // (ranks * per_rank)
    stages = ranks * per_rank
    timelines = schedules.simulate(order, [1e-3 * blocks] * stages, [2e-3 * blocks] * stages)
    ends = [timed.end for timeline in timelines for timed in timeline]
    assert predicted.seconds == pytest.approx(max(ends), rel=1e-6)
    assert predicted.bubble == pytest.approx(schedules.bubble_fraction(timelines), abs=1e-6)
    assert predicted.simulated is not None
    # The same figures as of a measured step.
    assert measured_bubble(predicted.simulated.lanes) == pytest.approx(predicted.bubble, abs=1e-6)
    passes = sum(event["cat"] != "wait" for event in chrome_trace(predicted.simulated.lanes))
    assert passes == sum(map(len, order))
