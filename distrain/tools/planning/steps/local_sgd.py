"""A step of ``local_sgd``: ranks train by themselves, and merge their models every few steps."""

from __future__ import annotations

import dataclasses

from distrain.gradients.bucket_sizes import MIB
from distrain.tools.planning.prediction import Memory, Prediction
from distrain.tools.planning.simulation import Compute, Operation, Start, Wait
from distrain.tools.planning.steps.common import Setting, parts_of

#: What the arithmetic of a merge reads and writes, in copies of the parameters. The difference from the anchor:
#: copying the parameters (into a buffer of zeros, 1.5), subtracting and weighting (2.5). The merge: copying them again
#: (1.5), two additions and two products (5), the outer update (1.5), and the copy back (1). Then the result is hashed.
_COPIES = 13.0
#: Bytes of a part of the parameters that is merged at once.
_PART_BYTES = 25 * MIB
#: Bytes of a hash of the merged parameters.
_HASH_BYTES = 8


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
    workload, ranks = setting.workload, setting.cluster.ranks
    share = -(-workload.batch_size // ranks)
    pieces = workload.pieces(share)
    each = [Compute("update", workload.outside_seconds(share))]
    for samples in pieces:
        each.append(Compute("forward", workload.forward_seconds(samples)))
        each.append(Compute("backward", workload.backward_seconds(samples)))
    each.append(Compute("update", workload.update_seconds))
    merge = setting.network.all_reduce(workload.gradient_bytes, setting.network.group(ranks))
    representatives = setting.representatives()
    # All steps from merge to merge: those during which one is under way, and the others.
    program: list[Operation] = [Start("merge", merge, len(representatives), "replicas")]
    program += _repeated(each, overlap_steps)
    program += [Wait("merge"), Compute("update", _COPIES * workload.copy_seconds + workload.digest_seconds)]
    # Each rank's hash goes to all others, who wait for it in the next step.
    hashes = setting.network.all_gather(_HASH_BYTES, setting.network.group(ranks))
    program += [Start("hashes", hashes, len(representatives), "replicas"), Wait("hashes")]
    program += _repeated(each, sync_every - overlap_steps)
    simulated = setting.simulate([program] * len(representatives), representatives)
    computed = max(sum(kinds.values()) for kinds in simulated.computed)
    stragglers = setting.stragglers(computed / sync_every, ranks, sync_every)
    parts = {part: seconds / sync_every for part, seconds in parts_of(simulated, 0.0).items()}
    parts["stragglers"] = stragglers
    return Prediction(
        keys,
        parts,
        merge.sent / sync_every,
        _memory(setting, max(pieces), overlap_steps),
        same_as_single=False,
    )


def _repeated(step: list[Compute], count: int) -> list[Compute]:
    """So many steps, with equal parts as one."""
    return [dataclasses.replace(part, seconds=count * part.seconds) for part in step] if count else []


def _memory(setting: Setting, samples: int, overlap_steps: int) -> Memory:
    """Anchor and difference all the time, and a copy of the part that is being merged, after or during passes."""
    size, activations = setting.workload.gradient_bytes, setting.workload.activation_bytes(samples)
    part = min(size, _PART_BYTES)
    if overlap_steps:
        return setting.memory(activations, 2.0 * size + part)
    return setting.memory(max(activations, part), 2.0 * size)
