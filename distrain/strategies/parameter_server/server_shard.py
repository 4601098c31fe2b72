"""The part of the model that a server holds: parameters, their gradients and their optimizer."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distrain.checkpoint import named_state
from distrain.compression.base import MessageCompressor
from distrain.compression.encoding.packing import packed_size
from distrain.gradients.buckets import Gradients
from distrain.strategies.parameter_server.optimizer_wire import encode_optimizer_state
from distrain.strategies.parameter_server.push import Push
from distrain.strategies.parameter_server.shards import trained_among


@dataclass
class ServerShard:
    """The part of the model that a server holds. It has no lock of its own: the server guards it.

    Attributes:
        parameters: Parameters by name, in the model's order.
        gradients: Their gradients, in the buckets in which workers push them.
        optimizer: The optimizer of these parameters.
        compressor: Decodes what the workers' compressors encoded.
        bucket_mb: Limit for the size of a bucket, in MiB.
    """

    parameters: dict[str, nn.Parameter]
    gradients: Gradients
    optimizer: torch.optim.Optimizer
    compressor: MessageCompressor
    bucket_mb: float = math.inf

    @property
    def bytes(self) -> int:
        """Size of the parameters."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.parameters.values())

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that are trained now: the others are neither pushed nor pulled."""
        return trained_among(self.parameters)

    def set_trained(self, names: Collection[str]) -> None:
        """Trains only the named parameters from now on; no push may be under way."""
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in names)
        self.gradients.rebuild_buckets(self.bucket_mb, self.bucket_mb)

    def payload_sizes(self, step: int) -> list[int]:
        """Size in bytes of each bucket's payload in a step."""
        self.compressor.step = step
        return [packed_size(self.compressor.payload_layout(bucket)) for bucket in self.gradients.buckets]

    def sum_pushes(self, pushes: Sequence[Push]) -> None:
        """Sets the gradients to the sum of some pushes, added in the given order."""
        self.gradients.zero()
        for push in pushes:
            self.compressor.step = push.step
            for bucket, payload in zip(self.gradients.buckets, push.payloads, strict=True):
                self.compressor.decode(payload.to(bucket.flat.device), bucket)

    def squared_norm(self) -> float:
        """Squared Euclidean norm of the gradients."""
        return float(self.gradients.norm().double().square())

    def step(self, learning_rate: float) -> None:
        """Updates the parameters with the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()

    def encode_optimizer_state(self) -> tuple[dict[str, Any], Tensor]:
        """Returns the JSON and the body of a ``STATE`` frame that holds the optimizer's state."""
        return encode_optimizer_state(*named_state.optimizer_state(self.optimizer, self._names()))

    def load_optimizer_state(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Replaces the optimizer's state; names are ``<parameter name>/<state name>``."""
        self.optimizer.state.clear()
        named_state.load_optimizer(self.optimizer, self._names(), tensors, scalars)

    def _names(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self.parameters.items()}
