"""The compressors among which one is chosen, and what becomes of their residuals."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from distrain.compression.base import Compressor, build
from distrain.compression.bucket import Bucket
from distrain.compression.error_feedback import Residuals
from distrain.config.groups import CompressionConfig


class CandidateSet:
    """Candidates by name, of which one is active.

    Args:
        configs: Configuration of each candidate, from the least to the most lossy; ``none`` is one of them.
        seed: The run's seed.

    Attributes:
        configs: As given.
        active: Name of the candidate that compresses now.
        chosen: Name of the candidate that was chosen for good; ``None`` before.
        leftover: Residuals of candidates that were dropped; they are added to the next gradients.
    """

    def __init__(self, configs: Mapping[str, CompressionConfig], seed: int) -> None:
        self.configs = configs
        self.active = "none"
        self.chosen: str | None = None
        self.leftover = Residuals()
        self._seed = seed
        self._compressors = {name: build(config, seed) for name, config in configs.items()}
        self._uncompressed_numel: dict[tuple[str, tuple[str, ...]], int] = {}

    @property
    def names(self) -> list[str]:
        """The candidates; after the choice ``none`` and the chosen one."""
        return list(self._compressors)

    @property
    def compressors(self) -> list[Compressor]:
        """The candidates' compressors."""
        return list(self._compressors.values())

    @property
    def current(self) -> Compressor:
        """The active candidate's compressor."""
        return self._compressors[self.active]

    def activate(self, name: str) -> None:
        """Lets a candidate compress from the next step on."""
        self.active = name

    def new_compressor(self, name: str) -> Compressor:
        """Another compressor of a candidate's configuration, without state."""
        return build(self.configs[name], self._seed)

    def view(self, name: str, bucket: Bucket) -> Bucket:
        """A bucket with the compressed part that a candidate would give it; the order of the tensors stays.

        A tensor that the candidate would compress is sent uncompressed if it comes after one that it would not.
        """
        key = (name, tuple(bucket.tensors))
        if key not in self._uncompressed_numel:
            compressed = 0
            for tensor in bucket.tensors.values():
                if not self._compressors[name].compresses(nn.Parameter(tensor, requires_grad=False)):
                    break
                compressed += tensor.numel()
            self._uncompressed_numel[key] = bucket.flat.numel() - compressed
        return dataclasses.replace(bucket, uncompressed_numel=self._uncompressed_numel[key])

    def choose(self, name: str) -> None:
        """Activates a candidate for good; the residuals of the others pass to it, or to ``leftover``."""
        kept = self._compressors[name]
        dropped: dict[str, Tensor] = {}
        for compressor in self._compressors.values():
            if compressor is not kept:
                add_residuals(dropped, compressor.state_dict())
        if kept.residuals is not None:
            # Not through the next gradients: momentum correction would send them more than once.
            own = kept.residuals.state_dict()
            merged = {key: own[key] + dropped.pop(key) for key in list(dropped) if key in own}
            kept.residuals.load_state_dict(own | merged)
        add_residuals(dropped, self.leftover.state_dict())
        self.leftover.load_state_dict(dropped)
        self._compressors = {"none": self._compressors["none"], name: kept}
        self.active = self.chosen = name

    def residual_norm(self) -> Tensor | None:
        """Euclidean norm of the residuals of all candidates, a scalar; ``None`` if there are none."""
        norms = [norm for compressor in self.compressors if (norm := compressor.residual_norm()) is not None]
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else None

    def state_dict(self) -> dict[str, Tensor]:
        """The sum of all residuals and, after the choice, the rest of the chosen candidate's state."""
        state = self.leftover.state_dict()
        for compressor in self.compressors:
            own = compressor.state_dict()
            add_residuals(state, own)
            if self.chosen is not None:
                state |= {key: value for key, value in own.items() if key not in state}
        return state

    def load_residuals(self, state: Mapping[str, Tensor]) -> None:
        """Takes the residuals of any compressor's state as ``leftover``; the candidates start without state."""
        residuals: dict[str, Tensor] = {}
        add_residuals(residuals, state)
        self.leftover.load_state_dict(residuals)
        # After a rewind the candidates have state already.
        for compressor in self.compressors:
            compressor.load_state_dict({})

    def resume(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Chooses a candidate and restores its state, which :meth:`load_residuals` had before."""
        self.active = name
        if self.current.residuals is not None:
            self.leftover.load_state_dict({})
        self.current.load_state_dict(state)
        self.choose(name)


def add_residuals(total: dict[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Adds the residuals in one compressor's state to a total; tensors are not changed in place."""
    for key, tensor in state.items():
        if key.startswith("residual/"):
            total[key] = total[key] + tensor if key in total else tensor
