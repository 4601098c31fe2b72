"""Error feedback: what a message leaves out is added to the next step's gradient, so nothing is lost permanently.

Seide et al. 2014, "1-bit stochastic gradient descent", §3; Karimireddy et al. 2019, "Error feedback fixes SignSGD"
(arXiv 1901.09847), algorithm 1. Momentum correction: Lin et al. 2018, "Deep Gradient Compression" (arXiv 1712.01887),
§3.1 and §3.2.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from distrain.compression.bucket import Bucket


class Residuals:
    """What this rank has not sent yet, by parameter name, laid out as the buckets' compressed parts.

    Args:
        momentum: Factor of momentum correction; 0 for none. Gradients are added to a velocity that decays by this
            factor, and the velocity is added to the residual. It replaces the optimizer's momentum.
    """

    def __init__(self, momentum: float = 0.0) -> None:
        self._momentum = momentum
        self._residuals: dict[tuple[str, ...], Bucket] = {}
        self._velocities: dict[tuple[str, ...], Bucket] = {}
        # Loaded tensors whose bucket has not come yet.
        self._loaded: dict[str, Tensor] = {}

    def accumulate(self, bucket: Bucket) -> Bucket:
        """Adds a step's gradients to the residual.

        Returns:
            The residual itself, from which the caller removes what it sends.
        """
        names = tuple(bucket.compressed_tensors)
        if names not in self._residuals:
            self._residuals[names] = self._restored(bucket, "residual")
            if self._momentum:
                self._velocities[names] = self._restored(bucket, "velocity")
        residual = self._residuals[names]
        if self._momentum:
            velocity = self._velocities[names]
            velocity.flat.mul_(self._momentum).add_(bucket.compressed_part)
            residual.flat.add_(velocity.flat)
        else:
            residual.flat.add_(bucket.compressed_part)
        return residual

    def fold_into_gradients(self, bucket: Bucket) -> None:
        """Adds loaded residuals to a bucket's gradients and drops them, for runs that exchange nothing."""
        for name in list(bucket.compressed_tensors):
            saved = self._loaded.pop(f"residual/{name}", None)
            if saved is not None:
                bucket.tensors[name].add_(saved.to(bucket.flat.device))

    def clear_velocity(self, residual: Bucket, sent: Tensor) -> None:
        """Zeroes the velocity of elements that were sent (§3.2, momentum factor masking).

        Args:
            residual: From :meth:`accumulate`.
            sent: int64 indices into the compressed part.
        """
        if self._momentum:
            self._velocities[tuple(residual.tensors)].flat.index_fill_(0, sent, 0)

    def norm(self) -> Tensor | None:
        """Euclidean norm of all residuals, a scalar; ``None`` before the first step."""
        norms: list[Tensor] = [torch.linalg.vector_norm(residual.flat) for residual in self._residuals.values()]
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else None

    def state_dict(self) -> dict[str, Tensor]:
        """``residual/<parameter>`` and, with momentum correction, ``velocity/<parameter>``, shaped as parameters."""
        state = dict(self._loaded)
        for kind, buckets in (("residual", self._residuals), ("velocity", self._velocities)):
            for bucket in buckets.values():
                state |= {f"{kind}/{name}": tensor for name, tensor in bucket.tensors.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what :meth:`state_dict` returned; missing names start from zero."""
        self._residuals.clear()
        self._velocities.clear()
        self._loaded = {name: tensor for name, tensor in state.items() if name.startswith(("residual/", "velocity/"))}

    def leave_buckets(self) -> None:
        """Keeps everything by parameter name for buckets that are laid out anew; new names start from zero."""
        self.load_state_dict(self.state_dict())

    def _restored(self, bucket: Bucket, kind: str) -> Bucket:
        """Memory in the layout of the bucket's compressed part, filled with what was loaded and else with zeros."""
        restored = bucket.zeros_like_compressed()
        for name, tensor in restored.tensors.items():
            saved = self._loaded.pop(f"{kind}/{name}", None)
            if saved is not None:
                tensor.copy_(saved)
        return restored
