"""Clipping of gradients by their norm, for gradients that may be spread over several ranks or processes."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class ScalableGradients(Protocol):
    """The gradients of a whole model, wherever its parts are stored."""

    def norm(self) -> Tensor:
        """Euclidean norm over all gradients, a scalar."""

    def scale(self, factor: Tensor) -> None:
        """Multiplies all gradients, in place, by a scalar."""


def clip_gradient_norm(
    gradients: ScalableGradients, max_norm: float | None, norm: Tensor | None = None
) -> Tensor | None:
    """Scales gradients whose norm exceeds ``max_norm``, by the formula of ``torch.nn.utils.clip_grad_norm_``.

    Args:
        gradients: Scaled in place.
        max_norm: The limit; ``None``: no limit.
        norm: The norm of the gradients, where the caller has already computed it.

    Returns:
        The norm before clipping, a scalar; without a limit it is not computed, and ``norm`` is returned.
    """
    if max_norm is None:
        return norm
    norm = gradients.norm() if norm is None else norm
    gradients.scale((max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
