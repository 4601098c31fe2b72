"""A step of ``parameter_server`` with ``mode=sync``: workers push gradients and pull parameters."""

from __future__ import annotations

from distrain.gradients.bucket_sizes import BucketSizes
from distrain.tools.planning.network import Duration
from distrain.tools.planning.prediction import Memory, Prediction
from distrain.tools.planning.simulation import Compute, Operation, Start, Wait, simulate
from distrain.tools.planning.steps.common import Setting, backward_pieces, forward_pass, parts_of_rank
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
    gradients = workload.gradient_sizes
    backward = backward_pieces(workload, pieces[-1])

    worker: list[Operation] = [Compute("update", workload.outside_seconds(share))]
    server: list[Operation] = []
    for number, samples in enumerate(pieces):
        worker += forward_pass(setting, samples)
        if number < len(pieces) - 1:
            worker.append(Compute("backward", workload.backward_seconds(samples)))

    def message(size: float) -> Duration:
        """All workers exchange with one server, over its link."""
        one = network.to_server(workers * size / servers, worker_rank, server_rank)
        return Duration(one.seconds, one.processor_seconds / workers, size)

    around = Compute("overhead", workload.server_seconds)
    layout = bucket_layout(gradients, BucketSizes(bucket_mb, bucket_mb))
    # Each bucket is copied into a message.
    for number, bucket in enumerate(layout):
        worker.append(Compute("backward", sum(backward[index] for index in bucket)))
        size = sum(gradients[index] for index in bucket)
        worker.append(Compute("update", workload.copy_seconds * size / max(workload.gradient_bytes, 1)))
        worker += [around, Start(f"push {number}", message(size), 1, "push")]
        server += [Wait(f"push {number}"), around]
    # Zeros, to which each worker's message is added; at the end a copy for each worker's answer.
    copies = 0.5 + 1.5 * workers + workers
    server.append(Compute("update", (workload.update_seconds + copies * workload.copy_seconds) / servers))
    server += [around, Start("pull", message(workload.gradient_bytes), 1, "pull")]
    # The answer is copied into the model.
    worker += [Wait("pull"), Compute("update", workload.copy_seconds)]
    on_machine = min(cluster.ranks_per_machine, cluster.ranks)
    apart = cluster.ranks > on_machine
    simulated = simulate(
        [worker, server],
        [0, int(apart)],
        cluster.slowdown_of,
        [min(cluster.speed_of(rank) for rank in setting.representatives()), cluster.speed_of(server_rank)],
        alike=[min(on_machine, workers) if apart else workers, min(on_machine, servers)],
        bucket=cluster.token_bucket,
    )
    stragglers = setting.stragglers(sum(simulated.computed[0].values()), workers)
    whole = float(workload.gradient_bytes)
    # A worker has a buffer for the answer; a server has a message and an answer of each worker.
    on_worker = Memory(workload.held_bytes, whole, 0.0, workload.activation_bytes(max(pieces)), whole)
    on_server = Memory(
        workload.held_bytes, whole / servers, workload.optimizer_bytes / servers, 0.0, 2 * workers * whole / servers
    )
    return Prediction(
        keys,
        parts_of_rank(simulated, 0, stragglers),
        max(simulated.sent[0], simulated.sent[1] * workers / servers),
        max(on_worker, on_server, key=lambda memory: memory.total),
        same_as_single=not workload.batchnorms or workers == 1,
    )
