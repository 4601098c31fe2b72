"""Chooses a compressor by measuring the link, each candidate's work, and some steps with the most promising ones."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from distrain.communication.collectives import Communicator
from distrain.communication.types import Pending
from distrain.compression import base
from distrain.compression.autotune.candidate_set import CandidateSet
from distrain.compression.autotune.decision import CompressorDecision, world_size
from distrain.compression.base import Compressor
from distrain.compression.bucket import Bucket
from distrain.compression.error_feedback import Residuals
from distrain.config.groups import CompressionConfig
from distrain.config.registry import register
from distrain.config.schema import Config
from distrain.config.setting import setting
from distrain.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass
class AutoConfig(CompressionConfig):
    """Keys of ``compression=auto``."""

    most_lossy: str = setting("The last of the candidates, in their order, that may be chosen; none: no compression.")
    trial_seconds: float = setting(
        "Approximate time in which the most promising candidates take turns in real steps; 0: decide by prediction "
        "alone.",
        at_least=0,
    )
    candidates: dict[str, Any] = setting(
        "What to choose from besides none, from the least to the most lossy.", choices_of="compression"
    )

    def __post_init__(self) -> None:
        """Refuses a limit that is no candidate, and candidates that can't be chosen.

        Raises:
            ConfigError: One line naming the key, the value and the choices.
        """
        names = ["none", *self.candidates]
        if self.most_lossy not in names:
            raise ConfigError("compression.most_lossy", self.most_lossy, "is none of the candidates", names)
        for name, candidate in self.candidates.items():
            kind = candidate.get("name") if isinstance(candidate, Mapping) else getattr(candidate, "name", None)
            if kind in ("auto", "none"):
                raise ConfigError(f"compression.candidates.{name}.name", kind, "can't be a candidate")

    @property
    def allowed(self) -> dict[str, CompressionConfig]:
        """The candidates that may be chosen, from the least to the most lossy."""
        allowed: dict[str, CompressionConfig] = {"none": CompressionConfig(name="none")}
        for name, candidate in self.candidates.items():
            if self.most_lossy in allowed:
                break
            allowed[name] = candidate
        return allowed


@register("compression", "auto", AutoConfig)
class Auto(Compressor):
    """Begins without compression and continues with the compressor that makes steps fastest.

    :class:`~distrain.compression.autotune.decision.CompressorDecision` measures and decides; this class lets the active
    candidate compress. Among candidates that are about as fast the least lossy one is chosen. If the choice turns out
    slower than no compression, compression is switched off.

    In a pipeline the replicas of each stage decide separately, and by prediction alone, since a step's duration depends
    on the other stages too.
    """

    config: AutoConfig

    def __init__(self, config: AutoConfig, seed: int = 0) -> None:
        super().__init__(config, seed)
        self._communicator = Communicator()
        # A restored state until the first exchange, which tells whether the choice in it was made by the same ranks.
        self._loaded: dict[str, Tensor] = {}
        self._begin_choice()

    def _begin_choice(self) -> None:
        self._candidates = CandidateSet(self.config.allowed, self.seed)
        self._decision = CompressorDecision(self, self._candidates, self.config.trial_seconds)
        self.residuals: Residuals = self._candidates.leftover
        self.observer = self._decision
        # Names of all parameters whose gradients were exchanged, in order.
        self._parameters: dict[str, None] = {}

    @classmethod
    @override
    def check(cls, config: Config) -> None:
        """Refuses a limit that allows candidates which this configuration does not support.

        Raises:
            ConfigError: One line naming the key, the value and the choices.
        """
        options = config.compression
        if not isinstance(options, AutoConfig):
            raise TypeError(f"compression=auto is configured by {type(options).__name__}")
        possible: list[str] = []
        for name, candidate in options.allowed.items():
            try:
                alone = dataclasses.replace(config, compression=candidate)
                base.compressor_class(alone).check(alone)
            except ConfigError as error:
                why, _, _ = str(error).partition("; choices")
                most = options.most_lossy
                raise ConfigError("compression.most_lossy", most, f"allows {name}, but {why}", possible) from error
            possible.append(name)

    @override
    def compresses(self, parameter: nn.Parameter) -> bool:
        """Whether any candidate compresses the parameter's gradient."""
        return self.bucket_order(parameter) < 0

    @override
    def bucket_order(self, parameter: nn.Parameter) -> int:
        """Parameters that most candidates compress come first, so each candidate's part is the start of a bucket."""
        return -sum(compressor.compresses(parameter) for compressor in self._candidates.compressors)

    @override
    def begin_step(self) -> None:
        super().begin_step()
        self._begin_step_of_candidate()

    @override
    def buckets_change(self) -> None:
        """Chooses anew, since what pays depends on the size of the gradients."""
        state, self._loaded = self._candidates.state_dict(), {}
        self._begin_choice()
        self._candidates.load_residuals(state)

    @override
    def aggregate(self, bucket: Bucket, communicator: Communicator) -> Iterator[Pending]:
        self._communicator = communicator
        self._parameters |= dict.fromkeys(bucket.tensors)
        if self._loaded:
            self._resume_choice(next(iter(bucket.tensors)))
        if self.residuals.state_dict():
            self.residuals.fold_into_gradients(bucket)
        if self.observer is not None:
            self._decision.record_gradients(bucket)
        candidates = self._candidates
        return candidates.current.aggregate(candidates.view(candidates.active, bucket), communicator)

    @override
    def residual_norm(self) -> Tensor | None:
        return self._candidates.residual_norm()

    @override
    def report(self) -> dict[str, Any]:
        """The chosen candidate, and the measurements of this run that led to it."""
        table = self._decision.table
        return {"chosen": self._candidates.chosen, **(table.to_plain() if table is not None else {})}

    @override
    def state_dict(self) -> dict[str, Tensor]:
        """The state of the chosen compressor, and for each parameter the choice and the ranks that made it.

        ``choice/<parameter>`` is JSON text as uint8. Before the choice there are only the residuals of all candidates.
        """
        if self._loaded:
            return dict(self._loaded)
        state = self._candidates.state_dict() | {"step": torch.tensor(self.step)}
        chosen = self._candidates.chosen
        if chosen is not None:
            choice = torch.tensor(list(self._choice(chosen).encode()), dtype=torch.uint8)
            state |= {f"choice/{name}": choice for name in self._parameters}
        return state

    @override
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what :meth:`state_dict` returned, or the residuals of another compressor.

        The communicator is known at the first exchange. If these ranks made the choice it is kept, else everything is
        measured again.
        """
        self.step = int(state.get("step", torch.tensor(0)))
        self._candidates.load_residuals(state)
        self._loaded = dict(state)

    def _begin_step_of_candidate(self) -> None:
        # Every candidate counts the run's steps, so its random draws and warm-up are as if it had run from the start.
        current = self._candidates.current
        current.step = self.step - 1
        current.begin_step()
        self.phases = current.phases

    def _resume_choice(self, parameter: str) -> None:
        """Continues with the choice in the restored state, if it was made by the same number of ranks."""
        state, self._loaded = self._loaded, {}
        choice = bytes(state.get(f"choice/{parameter}", torch.tensor([])).tolist()).decode()
        name = next((name for name in self._candidates.names if self._choice(name) == choice), None)
        if name is None:
            return
        own = {key: value for key, value in state.items() if not key.startswith("choice/")}
        self._candidates.resume(name, own)
        self._begin_step_of_candidate()
        self._decision.detach()
        log.info("compression=auto continues with %s, which it chose before", name)

    def _choice(self, name: str) -> str:
        return json.dumps({"candidate": name, "ranks": self._communicator.size, "world_size": world_size()})
