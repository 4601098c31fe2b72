"""Gradients that are exchanged together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bucket:
    """Gradients that are exchanged in one message.

    Attributes:
        flat: All gradients of the bucket, 1-D; those to compress come first.
        tensors: Views of ``flat``, one per parameter, in the order of ``flat``, keyed by the parameter's name in the
            unsplit model and shaped as the parameter. A compressor stores its state by these names.
        uncompressed_numel: Number of elements at the end of ``flat`` that belong to tensors sent uncompressed.
    """

    flat: Tensor
    tensors: Mapping[str, Tensor]
    uncompressed_numel: int = 0

    @property
    def bytes(self) -> int:
        """Size of the uncompressed bucket, in bytes."""
        return self.flat.numel() * self.flat.element_size()

    @property
    def compressed_part(self) -> Tensor:
        """The gradients to compress, 1-D, a view of ``flat``."""
        return self.flat[: self.flat.numel() - self.uncompressed_numel]

    @property
    def uncompressed_part(self) -> Tensor:
        """The gradients to send uncompressed, 1-D, a view of ``flat``."""
        return self.flat[self.flat.numel() - self.uncompressed_numel :]

    @property
    def compressed_tensors(self) -> dict[str, Tensor]:
        """The tensors to compress by parameter name, each as a 1-D view in memory order."""
        views, offset, end = {}, 0, self.flat.numel() - self.uncompressed_numel
        for name, tensor in self.tensors.items():
            if offset == end:
                break
            views[name] = self.flat[offset : offset + tensor.numel()]
            offset += tensor.numel()
        return views

    def zeros_like_compressed(self) -> Bucket:
        """A bucket of zeros in new memory, with the layout of the compressed part alone."""
        flat = torch.zeros_like(self.compressed_part)
        return self._with_memory(flat, self.compressed_tensors, uncompressed_numel=0)

    def clone(self) -> Bucket:
        """A copy in new memory."""
        return self._with_memory(self.flat.clone(), self.tensors, self.uncompressed_numel)

    def _with_memory(self, flat: Tensor, names: Iterable[str], uncompressed_numel: int) -> Bucket:
        """A bucket of the named tensors, laid out as in this one, over other memory."""
        start = self.flat.storage_offset()
        tensors = {}
        for name in names:
            tensor = self.tensors[name]
            tensors[name] = flat.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset() - start)
        return Bucket(flat, tensors, uncompressed_numel)
