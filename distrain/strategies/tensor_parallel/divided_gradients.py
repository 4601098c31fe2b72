"""Gradients of a model of which each rank has a part of some parameters, and the others whole."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn
from typing_extensions import override

from distrain.communication.collectives import Communicator
from distrain.compression.base import Compressor
from distrain.gradients.bucket_sizes import BucketSizes
from distrain.gradients.buckets import Gradients, split_into_buckets
from distrain.reporting.metrics import Stopwatch
from distrain.torch_internals import foreach


class DividedGradients(Gradients):
    """As :class:`~distrain.gradients.buckets.Gradients`; each parameter of the unsplit model counts once in the norm.

    Args:
        parameters: This rank's, by name.
        divided: Names of those that are a part of a parameter.
        group: The ranks that have the parts.
        replicas: The ranks over which gradients are summed.
        compressor: Of their exchange.
        stopwatch: Records exposed communication.
        sizes: Limits of buckets; the same on all ranks of the group.

    All ranks of a replica and all replicas make it together.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        divided: Collection[str],
        group: Communicator,
        replicas: Communicator,
        compressor: Compressor,
        stopwatch: Stopwatch,
        sizes: BucketSizes,
    ) -> None:
        self._divided, self._group = frozenset(divided), group
        super().__init__(parameters, replicas, compressor, stopwatch, *sizes)
        # A group's first collective connects its ranks. In a backward pass ranks may come to it while others wait for
        # them in a layer of another group.
        replicas.barrier()

    @override
    def _split(
        self, parameters: list[tuple[str, nn.Parameter]], first_bytes: float, other_bytes: float, last_bytes: float
    ) -> list[list[tuple[str, nn.Parameter]]]:
        return split_by_division(parameters, self._divided, first_bytes, other_bytes, last_bytes)

    @override
    def norm(self) -> Tensor:
        """Euclidean norm over the gradients of the unsplit model, a scalar; all ranks of the group call it together."""
        if not self.buckets:
            return torch.zeros(())
        gradients = {name: tensor for bucket in self.buckets for name, tensor in bucket.tensors.items()}
        parts = [tensor for name, tensor in gradients.items() if name in self._divided]
        wholes = [tensor for name, tensor in gradients.items() if name not in self._divided]
        like = self.buckets[0].flat
        squares = self._group.all_reduce(_sum_of_squares(parts, like))
        return (squares + _sum_of_squares(wholes, like)).sqrt()


def split_by_division(
    parameters: list[tuple[str, nn.Parameter]], divided: Collection[str], *limits: float
) -> list[list[tuple[str, nn.Parameter]]]:
    """As :func:`~distrain.gradients.buckets.split_into_buckets`; parts of parameters and whole ones are by themselves.

    So the sums of what is whole are rounded, and compressed, alike on all ranks of the group, whose parts may differ in
    size.

    Args:
        parameters: In the order in which their gradients are sent.
        divided: Names of those that are a part of a parameter.
        *limits: Sizes in bytes.
    """
    kinds = [[pair for pair in parameters if (pair[0] in divided) is kind] for kind in (True, False)]
    parts = [part for kind in kinds for part in split_into_buckets(kind, *limits)]
    ready = {name: position for position, (name, _) in enumerate(parameters)}
    return sorted(parts, key=lambda part: ready[part[-1][0]])


def _sum_of_squares(tensors: list[Tensor], like: Tensor) -> Tensor:
    if not tensors:
        return like.new_zeros(())
    return torch.stack(foreach("norm", tensors)).square().sum()
