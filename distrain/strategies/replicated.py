"""The whole model on every replica: what single, ddp, local_sgd and parameter_server have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from distrain.checkpoint import module_state, named_state
from distrain.checkpoint.restore_report import RestoredPart
from distrain.communication.collectives import Communicator
from distrain.config.schema import Config
from distrain.data.sampler import accumulated_pieces
from distrain.gradients.buckets import Gradients, ReducedGradients
from distrain.models.foreign import auxiliary_weight
from distrain.models.freezing import still_modules, train_only
from distrain.models.outputs import logits_of
from distrain.optim.optimizers import modes
from distrain.runtime.agreement import agreed
from distrain.runtime.memory_limit import memory_limit
from distrain.strategies import held_memory
from distrain.strategies.base import MakeOptimizer, OptionsT_co, StepResult, Strategy
from distrain.strategies.buffer_snapshot import BufferSnapshot
from distrain.strategies.precision import Precision
from distrain.strategies.sharpness import Sharpness
from distrain.strategies.update import clip_and_step
from distrain.tasks.base import Task
from distrain.tasks.training_loss import training_loss

if TYPE_CHECKING:
    from distrain.data.batch import Batch, Targets
    from distrain.runtime.runtime import Runtime
    from distrain.strategies.recomputation.set_up import Measured


class Replicated(Strategy[OptionsT_co]):
    """Each replica holds the whole model and works on its share of the batch.

    The loss of a batch is a global sum over a global count, so uneven shares, a ragged last batch and accumulation
    change nothing but the order in which numbers are added.
    """

    knows_memory = True

    def __init__(self, config: Config, runtime: Runtime) -> None:
        super().__init__(config, runtime)
        self.precision = Precision(
            config.trainer.precision, runtime.device, check_gradients=config.trainer.on_nonfinite != "stop"
        )
        self._auxiliary_weight = auxiliary_weight(config.model)
        self._norm: Tensor | None = None
        # A layer that communicates in the forward pass needs every replica in every piece, even without samples.
        self._needs_every_piece = False
        # The same in evaluation, where few layers communicate, and a model may not be able to run without samples.
        self._evaluates_together = False

    @override
    def setup(self, model: nn.Module, task: Task, make_optimizer: MakeOptimizer, example: Tensor) -> None:
        self.model = model
        self.task = task
        self._still: list[nn.Module] = []
        # Before a strategy moves the parameters elsewhere. A rank that fails in passes in which ranks communicate ends,
        # and the watch tells the others.
        alone = Communicator() if self._passes_communicate else self._setup_ranks
        measured = agreed(alone, self.runtime, lambda: self._examine_blocks(example))
        self.gradients = self._make_gradients()
        updated = self._updated_parameters()
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in updated}
        self.optimizer = agreed(self._setup_ranks, self.runtime, lambda: self._make_optimizer(make_optimizer, updated))
        self._forward: nn.Module = model
        model.train()
        self._snapshot = BufferSnapshot([model]) if self.config.trainer.on_nonfinite != "stop" else None
        rho = self.config.optimizer.sam_rho
        self._sharpness = None if rho is None else Sharpness(rho, [model])
        if self.config.trainer.compile == "max":
            # Kernels chosen by timing and, on CUDA, graphs of them, for each size of batch anew: for a size that varies
            # there is neither. What comes between (exchange, optimizer) is outside of the graphs.
            model.compile(mode="max-autotune", dynamic=False)
        elif self.config.trainer.compile:
            model.compile()
        if measured is not None:
            self._choose_blocks(measured, make_optimizer, updated)

    @property
    def _setup_ranks(self) -> Communicator:
        """The ranks that do each part of set-up together."""
        return self.replicas

    @property
    def _passes_communicate(self) -> bool:
        """Whether ranks communicate while the model runs, before the first step too."""
        return self._needs_every_piece

    def _examine_blocks(self, example: Tensor) -> Measured | None:
        """Sets up ``model.checkpoint_activations``, or returns what its choice depends on."""
        if self.config.model.checkpoint_activations == "none":
            return None
        from distrain.strategies.recomputation import set_up

        config = self.config
        set_up.apply(config, self.model, example, self.precision.autocast)
        share = math.ceil(config.data.batch_size / self.data_shard[1])
        pieces = accumulated_pieces(config.trainer.largest_pass, config.data.batch_size, self.data_shard[1])
        samples = math.ceil(share / pieces)
        return set_up.measure(config, self.model, example, self.precision.autocast, samples)

    def _choose_blocks(
        self, measured: Measured, make_optimizer: MakeOptimizer, updated: list[tuple[str, nn.Parameter]]
    ) -> None:
        """Chooses the blocks whose activations are computed again; all replicas call it together."""
        from distrain.strategies.recomputation import set_up

        runtime = self.runtime
        present = sum(held_memory.bytes_by_kind(self.held_tensors()).values())
        limit = memory_limit(self.config, runtime.world, runtime.device, present)
        kept = sum(tensor.nbytes for tensor in self.kept_parameters().values())
        held = present + self._bytes_of_passes()
        if self.trainers_update:
            held += self._expected_optimizer_bytes(make_optimizer, updated)
        held += held_memory.copies_of_parameters(self.config) * kept
        set_up.apply_measured(measured, self.model, held, limit, self.replicas, runtime)

    def _expected_optimizer_bytes(self, make: MakeOptimizer, updated: list[tuple[str, nn.Parameter]]) -> int:
        """Bytes that the optimizer's state of this rank will take."""
        return held_memory.expected_optimizer_bytes(make, updated)

    def _bytes_of_passes(self) -> int:
        """Bytes that a strategy holds during passes only, besides activations."""
        return 0

    def _make_gradients(self) -> ReducedGradients:
        return Gradients(self.model.named_parameters(), self.replicas, self.compressor, self.stopwatch)

    def _updated_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """What this rank's optimizer updates, by the model's names; called after :meth:`_make_gradients`."""
        return list(self.model.named_parameters())

    def _make_optimizer(self, make: MakeOptimizer, updated: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """The optimizer of what :meth:`_updated_parameters` returned."""
        return make(updated)

    @override
    def set_trained(self, names: frozenset[str]) -> None:
        assert self.freezing is not None
        self.compressor.buckets_change()
        train_only(self.model, names, self.freezing.ever_trained)
        self._rebuild_buckets()
        frozen = self.freezing.parameters - names
        self._still = [self.model.get_submodule(name) for name in still_modules(self.model, frozen)]
        self._set_training_mode()

    def _rebuild_buckets(self) -> None:
        """Lays out the gradients' buckets for the parameters that are trained now."""
        assert isinstance(self.gradients, Gradients)
        self.gradients.rebuild_buckets()

    def _set_training_mode(self) -> None:
        self._forward.train()
        for module in self._still:
            module.training = False

    @override
    def own_modules(self) -> list[nn.Module]:
        return [self.model] if hasattr(self, "model") else []

    @override
    def train_step(self, batch: Batch) -> StepResult:
        with self.stopwatch.step():
            self.compressor.begin_step()
            result = self._accumulate(batch, batch.global_count, sends=True)
            self.gradients.finish()
            if self._sharpness is not None:
                with self._sharpness.moved(self.gradients.norm()):
                    self._run_passes(batch, batch.global_count, sends=True)
                    self.gradients.finish()
            result.skipped = self._update()
        return result

    def _accumulate(self, batch: Batch, count: int, *, sends: bool) -> StepResult:
        """Runs forward and backward over the share, in pieces of ``trainer.micro_batch_size``.

        Args:
            batch: This replica's share.
            count: What the sum of the samples' losses is divided by.
            sends: Send each bucket of gradients as soon as it is complete.
        """
        modes.for_training(self.optimizer)
        # Visits all layers, so it is done after an evaluation only.
        if not self._forward.training:
            self._set_training_mode()
        if self._snapshot is not None:
            self._snapshot.take()
        return self._run_passes(batch, count, sends=sends)

    def _run_passes(self, batch: Batch, count: int, *, sends: bool) -> StepResult:
        """As :meth:`_accumulate`, in a model that is ready for it."""
        self.gradients.zero()
        pieces = self._pieces(batch)
        losses, metric_sums, samples = [], [], 0
        for index, (inputs, targets) in enumerate(pieces):
            if sends and index == len(pieces) - 1:
                self.gradients.begin_last_backward()
            with self.precision.autocast():
                output = self._forward(inputs)
                logits, loss_sum, size = training_loss(self.task, output, targets, self._auxiliary_weight)
            self.precision.scale(loss_sum / count).backward()
            losses.append(loss_sum.detach())
            metric_sums.append(self.task.measure(logits.detach(), targets))
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
        """The share in pieces of near-equal size, as many as the largest share needs, so that replicas don't differ."""
        count = accumulated_pieces(self.config.trainer.largest_pass, batch.global_count, self.data_shard[1])
        pieces = [(batch.inputs, batch.targets)] if count == 1 else batch.split(count)
        return pieces if self._needs_every_piece else [piece for piece in pieces if len(piece[0])]

    def _update(self) -> bool:
        """Applies the gradient; returns whether that was skipped because it is not finite."""
        self._norm, skipped = clip_and_step(
            self.gradients, self.optimizer, self.precision, self.config.trainer.grad_clip_norm, self._snapshot
        )
        return skipped

    @override
    def gradient_norm(self) -> Tensor:
        return self._norm if self._norm is not None else self.gradients.norm()

    @override
    @torch.no_grad()
    def eval_step(self, batch: Batch) -> StepResult:
        if not len(batch) and not self._evaluates_together:
            return self._no_samples()
        modes.for_evaluation(self.optimizer)
        self._forward.eval()
        with self.precision.autocast():
            outputs = self.task.evaluate(lambda inputs: logits_of(self._forward(inputs)), batch.inputs)
            loss_sum, count = self.task.loss(outputs, batch.targets)
        return StepResult(loss_sum, self.task.measure(outputs, batch.targets), count, outputs)

    @override
    def uncompressed_bytes_per_step(self) -> int:
        return self.gradients.bytes_per_step * (1 if self._sharpness is None else 2)

    @override
    def model_state(self) -> dict[str, Tensor]:
        self._prepare_model_state()
        return module_state.read(self.model).tensors

    @override
    def state_dict(self) -> dict[str, Any]:
        self._prepare_model_state()
        return self._saved(*self._optimizer_state())

    def _optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The optimizer's tensors that this replica saves if it is the first one, and its other values."""
        return named_state.optimizer_state(self.optimizer, self._names)

    def _prepare_model_state(self) -> None:
        """Makes the model hold what is evaluated and saved; all ranks call it together."""
        modes.for_evaluation(self.optimizer)

    @override
    def agree_on_average(self, average: Mapping[str, Tensor]) -> None:
        self._prepare_model_state()

    def _saved(self, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> dict[str, Any]:
        """What :meth:`state_dict` returns: model and optimizer on the first replica, and what is each rank's own.

        Args:
            tensors: Those of the optimizer.
            scalars: Likewise.
        """
        saves = self.replicas.rank == 0
        model = module_state.read(self.model)
        return {
            "model": model.tensors if saves else {},
            "optimizer": tensors if saves else {},
            "compressor": self.compressor.state_dict(),
            "local": module_state.own_state(self.model, model, self.replicas, self.runtime.device),
            "scalars": {
                "optimizer_name": self.config.optimizer.name,
                "optimizer": scalars,
                "precision": self.precision.state_dict(),
                "module": model.to_plain(),
            },
        }

    @override
    def load_state_dict(self, saved: Mapping[str, Any]) -> list[RestoredPart]:
        named_state.check_optimizer(self.config.optimizer.name, saved["scalars"])
        self._load_model(*self.module_state_of(saved))
        self._load_optimizer(saved["optimizer"], saved["scalars"]["optimizer"])
        names = [name for name, _ in self.model.named_parameters()]
        return [
            *named_state.restored_parts(saved, self.precision.dtype),
            self.precision.load_state_dict(saved["scalars"]["precision"]),
            *self.restore_compressor(saved, names, self.replicas.size),
        ]

    def _load_model(self, tensors: Mapping[str, Tensor], plain: dict[str, Any] | None) -> None:
        """Loads the model's saved state.

        Raises:
            ValueError: Names or shapes differ from the model's.
        """
        module_state.load(self.model, tensors, plain)

    def _load_optimizer(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Loads an optimizer's saved state, by the model's names."""
        named_state.load_optimizer(self.optimizer, self._names, tensors, scalars)
