"""What strategies have in common whose replicas share each batch and sum gradients during the backward pass."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar, override

from distrain.checkpoint.restore_report import RestoredPart
from distrain.communication.collectives import Communicator
from distrain.config.groups import StrategyConfig
from distrain.config.schema import Config
from distrain.gradients.bucket_sizes import BucketSizes, BucketSizing, gradient_bytes_of
from distrain.gradients.buckets import Gradients, ReducedGradients
from distrain.strategies import batchnorm
from distrain.strategies.base import MakeOptimizer, StepResult
from distrain.strategies.named_buffers import NamedBuffers
from distrain.strategies.replicated import Replicated
from distrain.tasks.base import Task

if TYPE_CHECKING:
    from distrain.data.batch import Batch

log = logging.getLogger(__name__)


@dataclass
class DataParallelConfig(StrategyConfig):
    """What a strategy with replicas needs to know; a strategy's own keys say it."""

    @property
    def synchronises_batchnorm(self) -> bool:
        """Whether BatchNorm layers take their statistics over all replicas."""
        return False

    @property
    def sizes(self) -> tuple[float | None, float | None, float | None]:
        """Configured sizes in MiB of the first bucket, the others and the last; ``None``: by measurement."""
        return None, None, None


OptionsT_co = TypeVar("OptionsT_co", bound=DataParallelConfig, default=DataParallelConfig, covariant=True)


class DataParallel(Replicated[OptionsT_co]):
    """Replicas train on their shares of each batch; gradients are summed over them during the backward pass."""

    @override
    @classmethod
    def normalises_together(cls, config: Config, world_size: int) -> bool:
        return cls.options_of(config).synchronises_batchnorm and cls.data_parallel_size(config, world_size) > 1

    @override
    @classmethod
    def prepare_trial(cls, config: Config, world_size: int, model: nn.Module) -> None:
        # Synchronised BatchNorm doesn't use torch's kernel, so it takes another time.
        if cls.normalises_together(config, world_size):
            batchnorm.synchronise_batchnorm(model, Communicator())

    @override
    def setup(self, model: nn.Module, task: Task, make_optimizer: MakeOptimizer, example: Tensor) -> None:
        if self.options.synchronises_batchnorm and self.replicas.size > 1:
            layers = batchnorm.synchronise_batchnorm(model, self.replicas)
            self._needs_every_piece = layers > 0
            self._evaluates_together = any(
                isinstance(layer, batchnorm.SyncBatchNorm) and layer.running_mean is None for layer in model.modules()
            )
            if layers:
                log.info(
                    "%d BatchNorm layers take their statistics over all ranks (%d small collectives a step); "
                    "strategy.batchnorm=local is faster but not what one process computes",
                    layers,
                    3 * layers,
                )
                if self.config.trainer.compile:
                    log.warning(
                        "trainer.compile: the graph breaks at each synchronised BatchNorm layer, which costs more than "
                        "it gains; strategy.batchnorm=local and %s compile whole",
                        batchnorm.replacement(self.config.model),
                    )
                    batchnorm.exclude_from_compilation()
        super().setup(model, task, make_optimizer, example)
        #: Buffers that each rank updates from its own share, as BatchNorm does with ``batchnorm=local``.
        self._local_buffers = NamedBuffers(model, floating=True, not_in=(batchnorm.SyncBatchNorm,))
        self._buffers_are_averaged = True

    @override
    def train_step(self, batch: Batch) -> StepResult:
        self._buffers_are_averaged = False
        return super().train_step(batch)

    @override
    def eval_step(self, batch: Batch) -> StepResult:
        self._prepare_model_state()
        return super().eval_step(batch)

    @override
    @torch.no_grad()
    def _prepare_model_state(self) -> None:
        """Averages the buffers that each rank updates by itself."""
        super()._prepare_model_state()
        if not self._buffers_are_averaged:
            self._average(self._local_buffers.values())
        self._buffers_are_averaged = True

    @override
    @torch.no_grad()
    def agree_on_average(self, average: Mapping[str, Tensor]) -> None:
        super().agree_on_average(average)
        self._average(tensor for name, tensor in average.items() if name in self._local_buffers)

    def _average(self, tensors: Iterable[Tensor]) -> None:
        """Gives each tensor its mean over the ranks."""
        if self.replicas.size > 1:
            for tensor in tensors:
                # In float64, so that a buffer that is equal on all ranks (a constant) keeps its value.
                tensor.copy_(self.replicas.all_reduce(tensor.double()).div_(self.replicas.size))

    @override
    def _make_gradients(self) -> ReducedGradients:
        sizes = self._choose_bucket_sizes()
        gradients = Gradients(self.model.named_parameters(), self.replicas, self.compressor, self.stopwatch, *sizes)
        self._bucket_sizing.log_choice([bucket.bytes for bucket in gradients.buckets])
        return gradients

    def _choose_bucket_sizes(self) -> BucketSizes:
        size = self._gradient_bytes()
        all_ranks, device = self.runtime.communicator(), self.runtime.device
        self._bucket_sizing = BucketSizing(
            self.options.sizes, self.replicas, all_ranks, device, size, deterministic=self.config.trainer.deterministic
        )
        return self._bucket_sizing.sizes(size)

    def _gradient_bytes(self) -> int:
        """Size of all gradients of a rank, by which buckets are sized; all ranks call it together."""
        return gradient_bytes_of(self.model)

    @override
    def _rebuild_buckets(self) -> None:
        assert isinstance(self.gradients, Gradients)
        self.gradients.rebuild_buckets(*self._bucket_sizing.sizes(self._gradient_bytes()))

    @override
    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["scalars"]["buckets"] = self._bucket_sizing.state_dict()
        return state

    @override
    def load_state_dict(self, saved: Mapping[str, Any]) -> list[RestoredPart]:
        if self.is_arranged_as(saved["layout"]):
            self._bucket_sizing.load_state_dict(saved["scalars"].get("buckets"))
            self._rebuild_buckets()
        return super().load_state_dict(saved)
