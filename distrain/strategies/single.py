"""One process: the training that every other strategy must equal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distrain.checkpoint import named_state
from distrain.checkpoint.restore_report import RestoredPart
from distrain.communication.collectives import Communicator
from distrain.config.registry import choices, register
from distrain.config.schema import Config, StrategyConfig
from distrain.errors import ConfigError
from distrain.gradients.buckets import Gradients, ReducedGradients
from distrain.gradients.clip import clip_gradient_norm
from distrain.strategies.base import MakeOptimizer, StepResult, Strategy
from distrain.strategies.buffer_snapshot import KeptBuffers
from distrain.strategies.precision import Precision
from distrain.tasks.base import Task

if TYPE_CHECKING:
    from distrain.data.batch import Batch, Targets
    from distrain.runtime.runtime import Runtime


@register("strategy", "single", StrategyConfig)
class Single(Strategy):
    """The whole model on every replica, each replica on its share of the batch; here there is one replica.

    The loss of a batch is a global sum over a global count, so uneven shares, a ragged last batch and accumulation
    change nothing but the order in which numbers are added.
    """

    def __init__(self, config: Config, runtime: Runtime) -> None:
        super().__init__(config, runtime)
        self.replicas = Communicator(ledger=self.ledger)
        self.precision = Precision(
            config.trainer.precision, runtime.device, looks=config.trainer.on_nonfinite != "stop"
        )
        self._clip = config.trainer.grad_clip_norm
        self._norm: Tensor | None = None
        # A layer that communicates in the forward pass needs every replica in every piece, even without samples.
        self._needs_every_piece = False
        # The same in evaluation, where few layers communicate, and a model may not be able to run without samples.
        self._evaluates_together = False

    @classmethod
    def check(cls, config: Config, world_size: int) -> None:
        """Refuses more than one rank."""
        if world_size > 1:
            others = [name for name in choices("strategy") if name != "single"]
            raise ConfigError("strategy", "single", f"runs on 1 rank, but {world_size} were started", others)

    def setup(self, model: nn.Module, task: Task, make_optimizer: MakeOptimizer, example: Tensor) -> None:
        """Lays the gradients out in buckets and builds the optimizer; see the base class."""
        self.model = model
        self.task = task
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        self.gradients = self._make_gradients()
        self.optimizer = make_optimizer(model.named_parameters())
        self._forward: nn.Module = model
        model.train()
        self._kept = KeptBuffers([model]) if self.config.trainer.on_nonfinite != "stop" else None
        if self.config.trainer.compile == "max":
            # Kernels chosen by timing and, on CUDA, graphs of them, for each size of batch anew: for a size that varies
            # there is neither. What comes between (exchange, optimizer) is outside of the graphs.
            model.compile(mode="max-autotune", dynamic=False)
        elif self.config.trainer.compile:
            model.compile()

    def _make_gradients(self) -> ReducedGradients:
        return Gradients(self.model.named_parameters(), self.replicas, self.compressor, self.stopwatch)

    def train_step(self, batch: Batch) -> StepResult:
        """One update from this replica's share of a global batch; see the base class."""
        with self.stopwatch.step():
            self.compressor.begin_step()
            result = self._accumulate(batch, batch.global_count, sends=True)
            self.gradients.finish()
            result.left_out = self._update()
        return result

    def _accumulate(self, batch: Batch, count: int, *, sends: bool) -> StepResult:
        """Makes the gradients those of the share's loss.

        Args:
            batch: This replica's share.
            count: What the sum of the samples' losses is divided by.
            sends: Send each bucket as soon as it is complete.
        """
        # Goes through all layers, so only after an evaluation.
        if not self._forward.training:
            self._forward.train()
        if self._kept is not None:
            self._kept.take()
        self.gradients.zero()
        pieces = self._pieces(batch)
        losses, metric_sums, samples = [], [], 0
        for index, (inputs, targets) in enumerate(pieces):
            if sends and index == len(pieces) - 1:
                self.gradients.begin_last_backward()
            with self.precision.autocast():
                outputs = self._forward(inputs)
                loss_sum, size = self.task.loss(outputs, targets)
            self.precision.scale(loss_sum / count).backward()
            losses.append(loss_sum.detach())
            metric_sums.append(self.task.measure(outputs.detach(), targets))
            samples += size
        if sends and not pieces:
            self.gradients.begin_last_backward()
        if not pieces:
            return self._no_samples()
        # The usual single piece needs no kernel to be summed.
        whole = len(pieces) == 1
        return StepResult(
            losses[0] if whole else torch.stack(losses).sum(),
            metric_sums[0] if whole else torch.stack(metric_sums).sum(0),
            samples,
        )

    def _no_samples(self) -> StepResult:
        device = self.runtime.device
        return StepResult(torch.zeros((), device=device), torch.zeros(len(self.task.metrics), device=device), 0)

    def _pieces(self, batch: Batch) -> list[tuple[Tensor, Targets]]:
        """The share in as many near-equal pieces as the largest share needs, so that all replicas have as many."""
        size = self.config.trainer.micro_batch_size
        largest = math.ceil(batch.global_count / self.data_shard[1])
        count = 1 if size is None else math.ceil(largest / size)
        pieces = [(batch.inputs, batch.targets)] if count == 1 else batch.split(count)
        return pieces if self._needs_every_piece else [piece for piece in pieces if len(piece[0])]

    def _update(self) -> bool:
        """Applies the gradient; returns whether that was left out because it is not finite."""
        self.precision.unscale(self.gradients)
        norm = self.gradients.norm() if self.precision.looks else None
        self._norm = clip_gradient_norm(self.gradients, self._clip, norm)
        updated = self.precision.step(self.optimizer, self._norm)
        if not updated and self._kept is not None:
            self._kept.put_back()
        return not updated and not self.precision.rescaled

    def gradient_norm(self) -> Tensor:
        """Norm of the last step's gradient before clipping; see the base class."""
        return self._norm if self._norm is not None else self.gradients.norm()

    @torch.no_grad()
    def eval_step(self, batch: Batch) -> StepResult:
        """Forward only; see the base class."""
        if not len(batch) and not self._evaluates_together:
            return self._no_samples()
        self._forward.eval()
        with self.precision.autocast():
            outputs = self.task.evaluate(self._forward, batch.inputs)
            loss_sum, count = self.task.loss(outputs, batch.targets)
        return StepResult(loss_sum, self.task.measure(outputs, batch.targets), count, outputs)

    def uncompressed_bytes_per_step(self) -> int:
        """Bytes this rank would send in a step without compression."""
        return self.gradients.bytes_per_step

    def model_state(self) -> dict[str, Tensor]:
        """Parameters and buffers by name."""
        return self.model.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Model, optimizer and loss scale; see the base class."""
        return self._saved(self.model_state(), *named_state.optimizer_state(self.optimizer, self._names))

    def _saved(self, model: dict[str, Tensor], tensors: dict[str, Tensor], scalars: dict[str, Any]) -> dict[str, Any]:
        """The state of a model and its optimizer, which the first replica saves, with what this rank has besides."""
        saves = self.replicas.rank == 0
        return {
            "model": model if saves else {},
            "optimizer": tensors if saves else {},
            "compressor": self.compressor.state_dict(),
            "scalars": {
                "optimizer_name": self.config.optimizer.name,
                "optimizer": scalars,
                "precision": self.precision.state_dict(),
            },
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> list[RestoredPart]:
        """Takes back what :meth:`state_dict` gave; see the base class."""
        named_state.check_optimizer(self.config.optimizer.name, saved["scalars"])
        named_state.load_model(self.model, saved["model"])
        named_state.load_optimizer(self.optimizer, self._names, saved["optimizer"], saved["scalars"]["optimizer"])
        return [
            *named_state.restored_parts(saved, self.precision.dtype),
            self.precision.load_state_dict(saved["scalars"]["precision"]),
            *self.restore_compressor(saved, self._names.values(), self.replicas.size),
        ]
