"""A step of replicas, or of one process: forward, backward with the exchange of gradients, update.

A replica is a rank (``ddp``), or several that divide layers (``mesh``; if it is the only one, ``tensor_parallel``).
"""

from __future__ import annotations

from collections.abc import Sequence

from distrain.tools.planning.prediction import Prediction
from distrain.tools.planning.simulation import Compute, Operation
from distrain.tools.planning.steps.common import (
    BATCHNORM_BACKWARD,
    BATCHNORM_FORWARD,
    Setting,
    backward_pass,
    backward_with_exchange,
    batchnorm_collectives,
    batchnorm_waits,
    bucket_sizes,
    forward_pass,
    parts_of,
)
from distrain.tools.planning.steps.shape import Shape
from distrain.tools.planning.workload import bucket_layout


def predict(
    setting: Setting,
    keys: dict[str, str],
    *,
    compressor: str = "none",
    sizes: Sequence[float | None] = (None, None, None),
    synchronised: bool = True,
    tensor: int = 1,
) -> Prediction:
    """Predicts a step of data parallelism.

    Args:
        setting: Where.
        keys: Keys and values of the command line that mean this.
        compressor: Name of the compressor.
        sizes: In MiB of the first bucket, the others and the last; ``None``: chosen as a run does.
        synchronised: BatchNorm layers take their statistics over all replicas.
        tensor: Ranks of a replica, which divide layers among themselves.
    """
    shape = Shape(data=setting.cluster.ranks // tensor, tensor=tensor)
    setting = setting.divided(shape)
    workload, replicas = setting.workload, shape.replicas
    group = shape.replicas_group(setting.network)
    share = -(-workload.batch_size // replicas)
    pieces = workload.pieces(share)
    together = synchronised and replicas > 1 and workload.batchnorms > 0
    factor = workload.synchronised_factor if together else 1.0
    chosen = bucket_sizes(setting, group, sizes)
    members = setting.members

    program: list[Operation] = [Compute("update", workload.outside_seconds(share))]
    for round_ in range(workload.rounds):
        if round_:
            program.append(Compute("update", workload.sharpness_seconds))
        for number, samples in enumerate(pieces):
            name = f"{round_}.{number}"
            program += forward_pass(setting, samples, factor, name)
            if together:
                forward = BATCHNORM_FORWARD * workload.batchnorms
                program += batchnorm_collectives(setting, f"statistics {name}", forward, members, group)
            if number == len(pieces) - 1 and replicas > 1:
                prefix = f"{round_} "
                program += backward_with_exchange(
                    setting, samples, group, chosen, members, compressor, factor, prefix, synchronised=together
                )
                continue
            program += backward_pass(setting, samples, factor, name)
            if together:
                backward = BATCHNORM_BACKWARD * workload.batchnorms
                program += batchnorm_collectives(setting, f"gradients {name}", backward, members, group)
    program.append(Compute("update", workload.update_seconds))
    simulated = setting.simulate([program] * members, setting.representatives())
    # Each layer whose statistics are shared waits for the slowest rank.
    times = workload.rounds * (1 + len(pieces) * (batchnorm_waits(workload) if together else 0))
    computed = max(sum(kinds.values()) for kinds in simulated.computed)
    stragglers = setting.stragglers(computed, replicas, 1 / times)
    stragglers += setting.stragglers_of_layers(computed, workload.rounds * len(pieces))
    residual = float(workload.gradient_bytes) if compressor in workload.keeping_residuals else 0.0
    return Prediction(
        keys,
        parts_of(simulated, stragglers),
        max(simulated.sent),
        setting.memory(workload.activation_bytes(max(pieces), "synchronised" if together else "plain"), residual),
        same_as_single=compressor == "none" and (together or not workload.batchnorms or replicas == 1),
        simulated=simulated,
    )


def layout(setting: Setting, sizes: Sequence[float | None]) -> tuple[tuple[int, ...], ...]:
    """Indices of the gradients in each bucket.

    Args:
        setting: Where.
        sizes: As for :func:`predict`.
    """
    workload = setting.workload
    group = setting.network.group(setting.cluster.ranks)
    chosen = bucket_sizes(setting, group, sizes)
    return bucket_layout(workload.gradient_sizes, chosen)
