"""The end of a step: unscale, clip, and apply the gradient unless it is not finite."""

from __future__ import annotations

import torch
from torch import Tensor

from distrain.gradients.clip import ScalableGradients, clip_gradient_norm
from distrain.strategies.buffer_snapshot import BufferSnapshot
from distrain.strategies.precision import Precision


def clip_and_step(
    gradients: ScalableGradients,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    max_norm: float | None,
    snapshot: BufferSnapshot | None,
) -> tuple[Tensor | None, bool]:
    """Updates the parameters; all ranks that share the gradients call it together and decide alike.

    Args:
        gradients: The reduced gradients of the whole model.
        optimizer: Of this rank's parameters.
        precision: Has scaled the loss, and says whether gradients are checked.
        max_norm: Limit of the gradients' norm; ``None`` for none.
        snapshot: Buffers as they were before the step, which are restored if the update is skipped.

    Returns:
        The norm before clipping, where it was computed; and whether the update was skipped for a gradient that is not
        finite and that a smaller loss scale would not mend.
    """
    precision.unscale(gradients)
    norm = gradients.norm() if precision.checks_gradients else None
    norm = clip_gradient_norm(gradients, max_norm, norm)
    updated = precision.step(optimizer, norm)
    if not updated and snapshot is not None:
        snapshot.restore()
    return norm, not updated and not precision.rescaled
