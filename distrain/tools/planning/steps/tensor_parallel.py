"""A step of ``tensor_parallel``: ranks take the same samples, and add up activations where divided layers end."""

from __future__ import annotations

from collections.abc import Iterator

from distrain.tools.planning.network import Duration
from distrain.tools.planning.prediction import Memory, Prediction
from distrain.tools.planning.simulation import Compute, Operation, Start, Wait
from distrain.tools.planning.steps.common import REPLICAS, Setting, parts_of
from distrain.tools.planning.workload import DividedModel, at, peak_bytes


def predict(setting: Setting, keys: dict[str, str]) -> Prediction:
    """Predicts a step of layers that are divided among all ranks.

    Args:
        setting: Where; its training has been measured with divided layers.
        keys: Keys and values of the command line that mean this.
    """
    divided = setting.workload.divided
    assert divided is not None, "it is no candidate without"
    workload, ranks = setting.workload, setting.cluster.ranks
    pieces = workload.pieces(workload.batch_size)
    representatives = setting.representatives()
    program = list(_program(setting, divided, pieces, len(representatives)))
    simulated = setting.simulate([program] * len(representatives), representatives)
    # Each sum waits for the slowest rank.
    waits = workload.rounds * len(pieces) * len(divided.sums)
    computed = max(sum(kinds.values()) for kinds in simulated.computed)
    return Prediction(
        keys,
        parts_of(simulated, setting.stragglers(computed, ranks, 1 / max(waits, 1))),
        max(simulated.sent),
        _memory(setting, divided, max(pieces)),
        same_as_single=True,
        simulated=simulated,
    )


def _program(setting: Setting, divided: DividedModel, pieces: list[int], members: int) -> Iterator[Operation]:
    workload, group = setting.workload, setting.network.group(setting.cluster.ranks)
    share = divided.block.gradient_bytes / max(workload.gradient_bytes, 1)
    yield Compute("update", workload.outside_seconds(workload.batch_size))
    for round_ in range(workload.rounds):
        if round_:
            yield Compute("update", share * workload.sharpness_seconds)
        for number, samples in enumerate(pieces):
            yield Compute("forward", at(divided.block.forward, samples))
            yield Compute("backward", at(divided.block.backward, samples))
            # Whether one after the other within the passes, or all at their end, ranks compute nothing meanwhile.
            sums = sum((setting.network.all_reduce(size * samples, group) for size in divided.sums), Duration())
            name = f"sums {round_}.{number}"
            yield Start(name, sums, members, REPLICAS)
            yield Wait(name)
    yield Compute("update", divided.update_seconds)


def _memory(setting: Setting, divided: DividedModel, samples: int) -> Memory:
    gradients = float(divided.block.gradient_bytes)
    # As for ranks that have the whole model.
    moved = (setting.workload.rounds - 1) * gradients
    activations = peak_bytes([divided.block], samples)
    return Memory(
        float(divided.block.held_bytes),
        gradients,
        divided.optimizer_bytes,
        max(activations, divided.update_bytes, moved),
        moved,
    )
