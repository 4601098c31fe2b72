"""A step of ``parameter_server`` with ``mode=sync``: workers push gradients and pull parameters."""

from __future__ import annotations

from distrain.gradients.bucket_sizes import BucketSizes
from distrain.tools.planning.network import Duration
from distrain.tools.planning.prediction import Prediction
from distrain.tools.planning.simulation import Compute, Operation, Start, Wait
from distrain.tools.planning.steps.common import Setting, backward_pieces, forward_pass, parts_of
from distrain.tools.planning.workload import bucket_layout

#: MiB of a message, as ``strategy.bucket_mb`` has them by default.
BUCKET_MB = 4.0


def predict(setting: Setting, keys: dict[str, str], *, servers: int, bucket_mb: float = BUCKET_MB) -> Prediction:
    """Predicts a step of synchronous parameter servers.

    A server's link carries the gradients of all workers to it, and the parameters to all workers.

    Args:
        setting: Where.
        keys: Keys and values of the command line that mean this.
        servers: Ranks that hold the parameters; all others are workers.
        bucket_mb: Size of messages in MiB.
    """
    workload, cluster, network = setting.workload, setting.cluster, setting.network
    workers = cluster.ranks - servers
    share = -(-workload.batch_size // workers)
    pieces = workload.pieces(share)
    server_rank, worker_rank = cluster.ranks - 1, 0
    gradients = tuple(size for block in workload.blocks for size in block.gradients)
    backward = backward_pieces(workload, pieces[-1])

    worker: list[Operation] = [Compute("update", workload.outside_seconds(share))]
    server: list[Operation] = []
    for number, samples in enumerate(pieces):
        worker += forward_pass(setting, samples)
        if number < len(pieces) - 1:
            worker.append(Compute("backward", workload.backward_seconds(samples)))

    def message(size: float) -> Duration:
        """All workers exchange with one server, over its link."""
        one = network.message(workers * size / servers, worker_rank, server_rank)
        return Duration(one.seconds, one.processor_seconds / workers, size)

    layout = bucket_layout(gradients, BucketSizes(bucket_mb, bucket_mb))
    for number, bucket in enumerate(layout):
        worker.append(Compute("backward", sum(backward[index] for index in bucket)))
        worker.append(Start(f"push {number}", message(sum(gradients[index] for index in bucket)), 1, "push"))
        server.append(Wait(f"push {number}"))
    server.append(Compute("update", workload.update_seconds / servers))
    server.append(Start("pull", message(workload.gradient_bytes), 1, "pull"))
    worker.append(Wait("pull"))
    simulated = setting.simulate([worker, server], [worker_rank, server_rank])
    crowd = cluster.slowdown_of(min(cluster.ranks_per_machine, cluster.ranks))
    parts = parts_of(simulated, 0.0, setting.stragglers(simulated.computed[0], workers))
    outside = crowd * workload.outside_seconds(share)
    parts["compute"] = max(simulated.computed[0] - outside, 0.0)
    parts["update"] = outside
    parts["waiting"] = simulated.seconds - simulated.computed[0]
    return Prediction(
        keys,
        parts,
        max(simulated.sent[0], simulated.sent[1] * workers / servers),
        setting.memory(workload.activation_bytes(max(pieces))),
        same_as_single=not workload.batchnorms or workers == 1,
    )
