"""Error feedback: what a message leaves out is added to the next step's gradient, so that nothing is lost for good.

Seide et al. 2014, "1-bit stochastic gradient descent", §3; Karimireddy et al. 2019, "Error feedback fixes SignSGD"
(arXiv 1901.09847), algorithm 1. Momentum correction is of Lin et al. 2018, "Deep Gradient Compression"
(arXiv 1712.01887), §3.1 and §3.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from distrain.compression.bucket import Bucket


class Residuals:
    """What this rank owes the others, by parameter name; laid out as the buckets' lossy parts.

    Args:
        momentum: Momentum correction: gradients enter a velocity with this factor, and the velocity is what is owed;
            0 for none. It replaces the optimizer's momentum.
    """

    def __init__(self, momentum: float = 0.0) -> None:
        self._momentum = momentum
        self._owed: dict[tuple[str, ...], Bucket] = {}
        self._velocities: dict[tuple[str, ...], Bucket] = {}
        self._loaded: dict[str, Tensor] = {}

    def add(self, bucket: Bucket) -> Bucket:
        """Adds a step's gradients to what is owed.

        Returns:
            All that is owed, to take the message out of.
        """
        names = tuple(bucket.compressed_tensors)
        if names not in self._owed:
            self._owed[names] = self._restored(bucket, "residual")
            if self._momentum:
                self._velocities[names] = self._restored(bucket, "velocity")
        owed = self._owed[names]
        if self._momentum:
            velocity = self._velocities[names]
            velocity.flat.mul_(self._momentum).add_(bucket.compressed_part)
            owed.flat.add_(velocity.flat)
        else:
            owed.flat.add_(bucket.compressed_part)
        return owed

    def fold_into_gradients(self, bucket: Bucket) -> None:
        """Adds to a bucket's gradients what was loaded for them, where there is nobody to owe anything."""
        for name in list(bucket.compressed_tensors):
            saved = self._loaded.pop(f"residual/{name}", None)
            if saved is not None:
                bucket.tensors[name].add_(saved.to(bucket.flat.device))

    def forget(self, owed: Bucket, sent: Tensor) -> None:
        """Clears the velocity of elements (int64 indices into the lossy part) that were sent, as §3.2 masks them."""
        if self._momentum:
            self._velocities[tuple(owed.tensors)].flat.index_fill_(0, sent, 0)

    def norm(self) -> Tensor | None:
        """Euclidean norm of all that is owed, a scalar; ``None`` before the first step."""
        norms: list[Tensor] = [torch.linalg.vector_norm(each.flat) for each in self._owed.values()]
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else None

    def state_dict(self) -> dict[str, Tensor]:
        """``residual/<parameter>`` and, with momentum correction, ``velocity/<parameter>``, shaped as parameters."""
        state = dict(self._loaded)
        for what, buckets in (("residual", self._owed), ("velocity", self._velocities)):
            for bucket in buckets.values():
                state |= {f"{what}/{name}": tensor for name, tensor in bucket.tensors.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what :meth:`state_dict` gave; a name that is not given starts from zero."""
        self._owed.clear()
        self._velocities.clear()
        self._loaded = {name: tensor for name, tensor in state.items() if name.startswith(("residual/", "velocity/"))}

    def _restored(self, bucket: Bucket, what: str) -> Bucket:
        """Memory like the bucket's lossy part, filled with what was loaded for its names."""
        made = bucket.zeros_like_compressed()
        for name, tensor in made.tensors.items():
            saved = self._loaded.pop(f"{what}/{name}", None)
            if saved is not None:
                tensor.copy_(saved)
        return made
