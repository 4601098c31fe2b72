"""A step of ``local_sgd``: ranks train by themselves, and merge their models every few steps."""

from __future__ import annotations

from distrain.tools.planning.prediction import Prediction
from distrain.tools.planning.simulation import Compute, Operation
from distrain.tools.planning.steps.common import Setting, forward_pass, parts_of


def predict(
    setting: Setting,
    keys: dict[str, str],
    *,
    sync_every: int,
    overlap_steps: int = 0,
    outer_copies: int = 1,
) -> Prediction:
    """Predicts the mean step between two merges.

    Args:
        setting: Where.
        keys: Keys and values of the command line that mean this.
        sync_every: Steps from merge to merge.
        overlap_steps: Steps taken while a merge is under way.
        outer_copies: Copies of the parameters that the merge keeps.
    """
    workload, cluster = setting.workload, setting.cluster
    ranks = cluster.ranks
    share = -(-workload.batch_size // ranks)
    pieces = workload.pieces(share)
    program: list[Operation] = [Compute("update", workload.outside_seconds(share))]
    for samples in pieces:
        program += forward_pass(setting, samples)
        program.append(Compute("backward", workload.backward_seconds(samples)))
    program.append(Compute("update", workload.update_seconds))
    representatives = setting.representatives()
    simulated = setting.simulate([program] * len(representatives), representatives)
    merge = setting.network.all_reduce(workload.gradient_bytes, setting.network.group(ranks))
    hidden = overlap_steps * simulated.seconds
    exposed = max(merge.seconds - hidden, 0.0) if overlap_steps else merge.seconds
    crowd = cluster.slowdown_of(min(cluster.ranks_per_machine, ranks))
    update = crowd * (workload.outside_seconds(share) + workload.update_seconds)
    parts = parts_of(simulated, update, setting.stragglers(max(simulated.computed), ranks, sync_every))
    parts["waiting"] += exposed / sync_every
    return Prediction(
        keys,
        parts,
        merge.sent / sync_every,
        setting.memory(workload.activation_bytes(max(pieces)), float(outer_copies * workload.gradient_bytes)),
        same_as_single=False,
    )
