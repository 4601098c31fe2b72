"""The link to a parameter server, between real processes."""

from __future__ import annotations

from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.tools.planning.cluster import Link
from distrain.tools.planning.socket_link import measure_sockets
from tests.harness import run_ranks
from tests.runs import small


def measured_link() -> Link:
    world = World.from_environment()
    with Runtime(small("strategy=ddp", "data.batch_size=30"), world, keep_logs=False) as runtime:
        return measure_sockets(runtime.communicator(), world, runtime.device, 60.0)


def test_all_ranks_learn_the_times_of_the_first_and_the_last_one() -> None:
    links = run_ranks(measured_link, 3)
    assert links[1] == links[0] == links[2]
    assert [point.sent for point in links[0].points] == [0, 64 * 1024, 4 * 2**20]
    assert 0 < links[0].latency < links[0].points[-1].seconds
