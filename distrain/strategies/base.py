"""What the trainer asks of a strategy, and what a strategy gives back."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, cast

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar

from distrain.checkpoint import module_state
from distrain.checkpoint.restore_report import RestoredPart
from distrain.communication.collectives import Communicator, Ledger
from distrain.compression import base as compression
from distrain.compression import resharding
from distrain.config.groups import StrategyConfig
from distrain.config.registry import choice
from distrain.config.schema import Config
from distrain.data.sampler import accumulated_pieces, part_sizes
from distrain.health.mesh_place import sizes_of
from distrain.models.freezing import FreezeSchedule
from distrain.reporting.metrics import Stopwatch
from distrain.runtime.consensus import AllReduceConsensus, Consensus, SingleRankConsensus
from distrain.runtime.device import float64_device
from distrain.strategies import initial_state
from distrain.strategies.held_memory import optimizer_tensors
from distrain.tasks.base import Task
from distrain.torch_internals import tensors_in

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.distributed.device_mesh import DeviceMesh

    from distrain.data.batch import Batch
    from distrain.models.deferred import DeferredTensors
    from distrain.runtime.runtime import Runtime
    from distrain.strategies.precision import Precision

log = logging.getLogger(__name__)

OptionsT_co = TypeVar("OptionsT_co", bound=StrategyConfig, default=StrategyConfig, covariant=True)
MakeOptimizer = Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer]

_COMPRESSOR_PARTS = (resharding.RESIDUALS, resharding.FACTORS)


@dataclass
class StepResult:
    """Sums and counts of one step over this rank's share of the batch; never means, so that they add up exactly.

    Attributes:
        loss_sum: Sum of the samples' losses, a scalar on the device.
        metric_sums: Sums of the task's metrics, ``[len(task.metrics)]`` on the device.
        count: Samples in this rank's share.
        outputs: The model's outputs for these samples; only from :meth:`Strategy.eval_step`, and in a pipeline only on
            the rank of the last stage.
        skipped: Whether the update was skipped because the gradient was not finite; see
            :attr:`Strategy.skips_locally`. Only if ``trainer.on_nonfinite`` is ``skip`` or ``rewind``: the check costs
            time.
    """

    loss_sum: Tensor
    metric_sums: Tensor
    count: int
    outputs: Tensor | None = None
    skipped: bool = False


class Strategy(ABC, Generic[OptionsT_co]):
    """How one training step is divided among the ranks.

    Attributes:
        options: The strategy's own keys.
        mesh: Named dimensions of the ranks (data, pipeline, …); ``None`` for one rank.
        data_shard: ``(index, count)``: which share of each global batch this rank works on.
        replicas: The ranks that hold the same part of the model as this one, each with a share of every batch.
        ledger: Bytes this rank has sent.
        stopwatch: Time this rank's steps took, and how much of it was exposed communication.
        optimizer: Made by :meth:`setup`; the trainer sets its learning rate.
        freezing: When each parameter is trained; set before :meth:`setup` if some are not always trained.
        initial_values: Computes the values of the model's hollow tensors, if :meth:`setup` is given a model with some.
        saved_layout: The :attr:`layout` of the run that will be resumed, as its checkpoint says, which may come from
            anywhere; set before :meth:`setup`. Empty if none will.
        compressor: Compresses what is reduced among replicas.
        compressed_quantity: Quantity being compressed; residuals share its unit.
        divides_model: Whether an optimizer of a rank has some of the model's parameters alone.
        slices_parameters: Whether an optimizer of a rank has slices of parameters instead of parameters.
        steps_alike: Whether all ranks make every update of their parameters together, with the gradient of the whole
            batch; ``optimizer.sam_rho`` and optimizers with modes need that.
        saves_in_background: Whether checkpoints may be written while training goes on, over a process group of their
            own.
        knows_memory: Whether a rank's memory is known before it trains, as ``model.checkpoint_activations=auto`` and
            ``trainer.micro_batch_size=auto`` need.
        trainers_update: Whether ranks that run the model also run its optimizer, and so have the optimizer's state.
    """

    compressed_quantity: ClassVar[str] = "gradients"
    divides_model: ClassVar[bool] = False
    slices_parameters: ClassVar[bool] = False
    steps_alike: ClassVar[bool] = False
    saves_in_background: bool = True
    knows_memory: ClassVar[bool] = False
    trainers_update: ClassVar[bool] = True
    mesh: DeviceMesh | None = None
    data_shard: tuple[int, int] = (0, 1)
    optimizer: torch.optim.Optimizer
    freezing: FreezeSchedule | None = None
    saved_layout: Mapping[str, Any] = MappingProxyType({})
    initial_values: DeferredTensors | None = None

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self.config = config
        self.options = self.options_of(config)
        self.runtime = runtime
        self.ledger = Ledger()
        self.replicas = Communicator(ledger=self.ledger)
        self.stopwatch = Stopwatch(runtime.device)
        self.compressor = compression.build(config.compression, config.seed)
        self._measured_from = 0
        #: Names of the parameters that are trained now; ``None`` before the first epoch.
        self._trained: frozenset[str] | None = None

    @classmethod
    def options_of(cls, config: Config) -> OptionsT_co:
        """The strategy's own keys; the schema that it is registered with has checked them."""
        return cast(OptionsT_co, config.strategy)

    @classmethod
    def chosen(cls, config: Config) -> type[Strategy]:
        """The class that trains this configuration: another one if this one stands for several."""
        return cls

    @property
    def layout(self) -> dict[str, Any]:
        """How the ranks are arranged. State that each rank saves for itself can only be restored in the same layout."""
        return {
            "strategy": self.config.strategy.name,
            "world_size": self.runtime.world.size,
            "mesh": sizes_of(self.mesh),
            "travels": self.compressed_quantity,
        }

    def is_arranged_as(self, layout: Mapping[str, Any]) -> bool:
        """Whether this is the layout of a saved run."""
        return layout == self.layout

    @classmethod
    def check(cls, config: Config, world_size: int) -> None:
        """Refuses what this strategy can't run, before any process group forms.

        Raises:
            ConfigError: One line naming the key, the value and the choices.
        """

    @classmethod
    def check_model(cls, config: Config, model: nn.Module) -> None:
        """Refuses a model that this strategy can't train; the model has shapes but no values (the meta device).

        Raises:
            ConfigError: As :meth:`check`.
        """

    @classmethod
    def check_passes(cls, config: Config, model: nn.Module, images: Tensor, precision: Precision) -> None:
        """Refuses a model by what running it shows, before any process group forms.

        Args:
            config: The run's configuration.
            model: Can run these images; it may have shapes but no values (the meta device).
            images: Two images.
            precision: Of forward passes.

        Raises:
            ConfigError: As :meth:`check`.
        """

    @classmethod
    def data_parallel_size(cls, config: Config, world_size: int) -> int:
        """How many ranks share a batch."""
        return world_size

    @classmethod
    def most_trial_bytes(cls, config: Config) -> float:
        """Size of the largest model that each rank may hold whole before :meth:`setup`, for trials.

        Where it is finite, :meth:`setup` is given a model with hollow tensors.
        """
        return math.inf

    @classmethod
    def forward_sizes(cls, config: Config, world_size: int, count: int, *, training: bool) -> list[list[int]]:
        """How many samples each forward pass over a global batch has, for each rank that shares the batch.

        Args:
            config: The run's configuration.
            world_size: Number of ranks.
            count: Samples in the global batch.
            training: In a training step; otherwise in evaluation.

        Returns:
            One list a rank; passes without samples have the size 0.
        """
        shards = cls.data_parallel_size(config, world_size)
        pieces = accumulated_pieces(config.trainer.largest_pass, count, shards) if training else 1
        return [part_sizes(share, pieces) for share in part_sizes(count, shards)]

    @classmethod
    def normalises_together(cls, config: Config, world_size: int) -> bool:
        """Whether BatchNorm layers take their statistics over the samples that all ranks run at the same time."""
        return False

    @classmethod
    def full_model_ranks(cls, config: Config, world_size: int) -> int:
        """How many ranks, from the first on, each run forward and backward passes of the whole model."""
        return cls.data_parallel_size(config, world_size)

    @classmethod
    def state_shares(cls, config: Config, world_size: int) -> dict[str, float]:
        """The share of ``parameters``, ``gradients`` and ``optimizer`` state that a rank has; 1 where it is absent."""
        return {}

    @classmethod
    def gathered_bytes(cls, config: Config, parameter_bytes: int) -> float:
        """Bytes of others' parameters, and of their gradients, that a pass needs of a model of so many bytes."""
        return 0.0

    @classmethod
    def prepare_trial(cls, config: Config, world_size: int, model: nn.Module) -> None:
        """Prepares a copy of the model for a timing trial: it computes as in a step, but without the other ranks.

        The copy is discarded after the trial.
        """

    @property
    def training_group(self) -> Communicator:
        """The ranks that run the training loop together."""
        return self.runtime.communicator()

    @abstractmethod
    def setup(self, model: nn.Module, task: Task, make_optimizer: MakeOptimizer, example: Tensor) -> None:
        """Wraps or splits the model, then builds the optimizer over this rank's part.

        Args:
            model: The whole model, on this rank's device, equal on all ranks; see :attr:`initial_values`.
            task: Gives loss and metrics of the model's outputs.
            make_optimizer: Builds the optimizer from ``(name, parameter)`` pairs; names are the unsplit model's.
            example: This rank's inputs of a first batch, for a strategy that measures the model.
        """

    def begin_epoch(self, epoch: int) -> None:
        """Trains what ``freeze`` leaves for an epoch; all ranks call it together, before its first step.

        Also called before :meth:`load_state_dict`, for the epoch of the saved state. A checkpoint at the end of an
        epoch is saved after this method was called for the next one.
        """
        if self.freezing is None:
            return
        trained = self.freezing.trained(epoch)
        if trained == self._trained:
            return
        self._trained = trained
        self.set_trained(trained)
        if self.runtime.is_main and epoch < self.config.trainer.epochs:
            log.info("from epoch %d on: %s", epoch + 1, self.freezing.described(epoch))

    def set_trained(self, names: frozenset[str]) -> None:
        """Trains these parameters from the next step on, and keeps the others, and their optimizer's state, still.

        ``freeze`` is refused with a strategy that doesn't override it.

        Args:
            names: Among :attr:`freezing`'s ``ever_trained``. The same on all ranks, which call it together.
        """
        raise NotImplementedError(f"strategy={self.config.strategy.name} trains the same parameters in all epochs")

    def own_modules(self) -> list[nn.Module]:
        """The modules that this rank runs in a step, with the unsplit model's names inside; none on a server.

        Only ``verify`` needs them, to find out which layer differs.
        """
        return []

    def held_tensors(self) -> dict[str, list[Tensor]]:
        """What this rank holds between steps, by a kind of :data:`distrain.strategies.held_memory.KINDS`."""
        modules = self.own_modules()
        parameters = [parameter for module in modules for parameter in module.parameters()]
        return {
            "parameters": [*parameters, *(buffer for module in modules for buffer in module.buffers())],
            "gradients": [parameter.grad for parameter in parameters if parameter.grad is not None],
            "optimizer": [*optimizer_tensors(self.optimizer)] if modules else [],
            "buckets": [*tensors_in(self.compressor.state_dict())],
        }

    @abstractmethod
    def train_step(self, batch: Batch) -> StepResult:
        """Forward, backward, synchronisation, clipping and update for one global batch."""

    @abstractmethod
    def eval_step(self, batch: Batch) -> StepResult:
        """Forward only; ``outputs`` are given."""

    @abstractmethod
    def gradient_norm(self) -> Tensor:
        """Norm over the whole model of the last step's gradient, before clipping; a scalar, equal on all ranks."""

    @abstractmethod
    def model_state(self) -> dict[str, Tensor]:
        """Parameters and buffers by the unsplit model's names; all ranks call it together."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What this rank must save for training to continue; all ranks call it together.

        Returns:
            ``model`` and ``optimizer``: the tensors that this rank saves, by the unsplit model's names. Each tensor is
            saved by one rank; a rank may have none. ``slices``, where ranks share tensors: which of these are slices.
            ``scalars``: plain data, of which those of rank 0 are saved. ``compressor`` (its ``state_dict()``) and,
            where needed, ``local``: tensors that every rank saves for itself, by ``<kind>/<parameter name>``. The
            tensors are not copies: training changes them.
        """

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> list[RestoredPart]:
        """Restores what :meth:`state_dict` returned under this or another strategy.

        Args:
            state: ``model`` and ``optimizer`` of all ranks together; ``compressor`` and ``local`` as sequences with one
                entry per rank; ``layout`` of the run that saved.

        Returns:
            How each part was restored on this rank; the parts and their order are the same on all ranks.

        Raises:
            ValueError: Names or shapes differ from the model's.
        """

    def kept_parameters(self) -> dict[str, Tensor]:
        """What this rank keeps of each parameter for the whole run, by the unsplit model's names: it, or a slice."""
        named = (pair for module in self.own_modules() for pair in module.named_parameters(remove_duplicate=False))
        return {name: parameter.detach() for name, parameter in named}

    def part_of(self, name: str, whole: Tensor) -> Tensor:
        """The part of a tensor of a parameter's or buffer's shape that fits what this rank keeps of it.

        Raises:
            ValueError: It has another shape.
        """
        return whole

    def saved_part(self, name: str, kept: Tensor) -> Tensor:
        """What this rank saves of a tensor that is what it keeps of a parameter or buffer, if it saves some of it.

        All ranks that keep some of it call this together.
        """
        return kept

    def agree_on_average(self, average: Mapping[str, Tensor]) -> None:
        """Makes an average of this rank's tensors that of all ranks, in place; all ranks call it together.

        After it the model may hold the average, for an evaluation, until it gets its own values back.

        Args:
            average: By the unsplit model's names. Where ranks average other values of the same tensor, the mean of
                their averages is that of all, since an average is linear.
        """

    def consensus(self) -> Consensus:
        """How the ranks that train agree on requests between steps; all of them call it together, once."""
        if self.runtime.world.size == 1:
            return SingleRankConsensus()
        return AllReduceConsensus(self.runtime.control_group(), lambda: self.synchronised)

    @property
    def skips_locally(self) -> bool:
        """Whether each rank decides by its own gradient which updates to skip; else all ranks skip the same ones."""
        return False

    @property
    def synchronised(self) -> bool:
        """Whether the ranks waited for each other in the last step; the same on all of them."""
        return True

    def agree_on_shard(self) -> tuple[int, int]:
        """This rank's :attr:`data_shard`, which changes if ranks are lost; all ranks call it before they read data."""
        return self.data_shard

    def reduce_counts(self, name: str, counted: Tensor, *, settled: bool) -> Tensor:
        """Sum over the ranks of what each has counted since the last call.

        Args:
            name: What is counted.
            counted: This rank's numbers, 1-D; may be overwritten.
            settled: Wait until all ranks are at the same step. With ``False``, ranks that don't keep step may get the
                sum of what has been counted so far.
        """
        return self.training_group.all_reduce(counted)

    def sync_initial_state(self, model: nn.Module, communicator: Communicator) -> None:
        """Makes all ranks begin with the same parameters and buffers; they call it together."""
        initial_state.synchronise(model, communicator, self.runtime.device)

    def module_state_of(self, saved: Mapping[str, Any]) -> tuple[Mapping[str, Tensor], dict[str, Any] | None]:
        """The model's saved tensors and its other state, with this rank's own where the ranks are arranged as before.

        Args:
            saved: As for :meth:`load_state_dict`.
        """
        same_layout = self.is_arranged_as(saved["layout"])
        own = saved["local"][self.runtime.world.rank] if same_layout and saved.get("local") else {}
        return module_state.with_own_state(saved["model"], saved["scalars"].get("module"), own)

    def restore_compressor(self, saved: Mapping[str, Any], names: Iterable[str], replicas: int) -> list[RestoredPart]:
        """Restores this rank's part of the compressors' state of a saved run.

        Args:
            saved: As for :meth:`load_state_dict`.
            names: Parameters that this rank holds.
            replicas: How many ranks hold each of them.
        """
        saved_quantity = saved["layout"].get("travels", Strategy.compressed_quantity)
        if saved_quantity != self.compressed_quantity:
            if all(key == "step" for each in saved["compressor"] for key in each):
                return [RestoredPart(part, "absent", "none were saved") for part in _COMPRESSOR_PARTS]
            log.warning("the residuals of the saved run are of %s: they are discarded", saved_quantity)
            return [
                RestoredPart(part, "reset", f"of {saved_quantity}; this run compresses {self.compressed_quantity}")
                for part in _COMPRESSOR_PARTS
            ]
        restored = resharding.restore(
            self.compressor,
            saved["compressor"],
            same_layout=self.is_arranged_as(saved["layout"]),
            rank=self.runtime.world.rank,
            names=names,
            replicas=replicas,
        )
        self._measured_from = self.compressor.step
        return restored

    def uncompressed_bytes_per_step(self) -> int:
        """Bytes this rank would send in a step without compression."""
        return 0

    def metrics(self) -> dict[str, float]:
        """Further scalars for the log, by tag; all ranks call it together, whenever metrics are logged.

        By default those of compression: milliseconds per step that a rank compresses and decompresses, the mean of all
        ranks, and the Euclidean norm of all ranks' residuals.
        """
        return self.compression_metrics(self.training_group)

    def compression_metrics(self, communicator: Communicator) -> dict[str, float]:
        """The scalars of compression, over the ranks of ``communicator``."""
        steps = self.compressor.step - self._measured_from
        if self.config.compression.name == "none" or steps <= 0:
            return {}
        norm = self.compressor.residual_norm()
        mine = torch.zeros(2, dtype=torch.float64, device=float64_device(self.runtime.device))
        mine[0] = self.stopwatch.compression_seconds() / steps
        if norm is not None:
            mine[1] = norm.to(mine.device).double().square()
        seconds, squares = communicator.all_reduce(mine).tolist()
        found = {"compression/ms_per_step": 1000 * seconds / communicator.size}
        if norm is not None:
            found["compression/residual_norm"] = math.sqrt(squares)
        return found

    def report(self) -> dict[str, Any]:
        """Further entries of ``summary.json``; all ranks call it together at the end of a run."""
        metrics = self.compression_metrics(self.training_group)
        found = {name.removeprefix("compression/"): value for name, value in metrics.items()}
        return {"compression_report": {**found, **self.compressor.report()}} if found else {}

    def figures(self) -> dict[str, Figure]:
        """Figures for the logger, by name, after :meth:`report`; on the rank that writes."""
        return {}

    def set_learning_rate(self, rate: float) -> None:
        """Sets the rate of the next update."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def run(self, fit: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Runs everything a rank does between set-up and the end, and returns the run's summary.

        By default that is ``fit``. A rank with other work (a server) does that instead and returns an empty summary.
        """
        return fit()


def strategy_class(config: Config) -> type[Strategy]:
    """The class that trains as the configuration says."""
    named = cast(type[Strategy], choice("strategy", config.strategy.name).target)
    return named.chosen(config)
