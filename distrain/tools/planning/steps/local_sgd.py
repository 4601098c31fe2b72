"""A step of ``local_sgd``: ranks train by themselves, and merge their models every few steps."""

from __future__ import annotations

from distrain.gradients.bucket_sizes import MIB
from distrain.tools.planning.prediction import Prediction
from distrain.tools.planning.simulation import Compute, Operation
from distrain.tools.planning.steps.common import Setting, forward_pass, parts_of

#: What the arithmetic of a merge reads and writes, in copies of the parameters. The difference from the anchor:
#: copying the parameters (into a buffer of zeros, 1.5), subtracting and weighting (2.5). The merge: copying them again
#: (1.5), two additions and two products (5), the outer update (1.5), and the copy back (1). Then the result is hashed.
_COPIES = 13.0
#: Bytes of a part of the parameters that is merged at once.
_PART_BYTES = 25 * MIB


def predict(
    setting: Setting,
    keys: dict[str, str],
    *,
    sync_every: int,
    overlap_steps: int = 0,
) -> Prediction:
    """Predicts the mean step between two merges.

    Args:
        setting: Where.
        keys: Keys and values of the command line that mean this.
        sync_every: Steps from merge to merge.
        overlap_steps: Steps taken while a merge is under way.
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
    computed = max(sum(kinds.values()) for kinds in simulated.computed)
    parts = parts_of(simulated, setting.stragglers(computed, ranks, sync_every))
    parts["waiting"] += exposed / sync_every
    crowd = cluster.slowdown_of(min(cluster.ranks_per_machine, ranks))
    slowest = min(cluster.speed_of(rank) for rank in representatives)
    work = _COPIES * workload.copy_seconds + workload.digest_seconds
    parts["update"] += crowd * work / slowest / sync_every
    return Prediction(
        keys,
        parts,
        merge.sent / sync_every,
        setting.memory(workload.activation_bytes(max(pieces)), _other_bytes(workload.gradient_bytes)),
        same_as_single=False,
    )


def _other_bytes(size: int) -> float:
    """Memory of a merge: anchor and difference all the time, and a copy of the part that is being merged."""
    return 2.0 * size + min(size, _PART_BYTES)
