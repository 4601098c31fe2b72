"""strategy=fsdp: data parallelism whose ranks share optimizer state, gradients and parameters instead of copying them.

Rajbhandari et al. 2020, "ZeRO" (arXiv 1910.02054); Zhao et al. 2023, "PyTorch FSDP" (arXiv 2304.11277).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from distrain.checkpoint import module_state, named_state
from distrain.checkpoint.restore_report import RestoredPart
from distrain.communication.collectives import Communicator, digest
from distrain.config.registry import register
from distrain.config.schema import Config
from distrain.data.sampler import accumulated_pieces
from distrain.gradients.bucket_sizes import MIB
from distrain.gradients.buckets import Gradients, ReducedGradients, split_into_buckets
from distrain.models.tensors import named_tensors, parameter_bytes
from distrain.runtime.agreement import agreed
from distrain.runtime.device import float64_device
from distrain.runtime.malloc import return_large_blocks
from distrain.strategies.base import MakeOptimizer
from distrain.strategies.ddp import DDP, DDPConfig
from distrain.strategies.fsdp import module_blocks, offload, options
from distrain.strategies.fsdp.gathering_strategy import GatheringStrategy
from distrain.strategies.fsdp.module_blocks import ModuleBlock
from distrain.strategies.fsdp.options import FILE, FULL, KEPT, OPTIMIZER, FSDPConfig
from distrain.strategies.fsdp.scattered_gradients import ScatteredGradients
from distrain.strategies.fsdp.sharded_update import ShardedUpdate, ShardGroups, divide_replicas
from distrain.strategies.held_memory import bytes_by_kind, copies_of_parameters
from distrain.tasks.base import Task

if TYPE_CHECKING:
    from distrain.runtime.runtime import Runtime

log = logging.getLogger(__name__)

#: With shard=full, a larger model is held whole by no rank, not even for a trial, and freed memory is not kept.
_MOST_TRIAL_MB = 64


@register("strategy", "fsdp", FSDPConfig)
class FSDP(GatheringStrategy[DDPConfig], DDP):
    """Trains as :class:`~distrain.strategies.ddp.DDP` does, and keeps on each rank its part of what others copy.

    Parameters are laid out in flat blocks that are cut into equal parts, one for each rank of a shard group. The
    optimizer updates this rank's slices of parameters, so its update of an element must not depend on others.

    With ``shard=optimizer`` gradients are summed as in ddp; with ``gradients`` each rank gets the sum for its part
    alone. In both, the updated parts are gathered after the update. With ``full`` blocks are gathered when the forward
    and the backward pass use them.
    """

    slices_parameters = True
    # Neither SAM nor an optimizer with modes reaches the parameters of other ranks.
    steps_alike = False

    def __init__(self, config: Config, runtime: Runtime) -> None:
        super().__init__(config, runtime)
        self._shard = self._sharding.shard
        # The mesh of ddp, which super() has made, has one dimension; its group is that of all ranks.
        self.mesh = divide_replicas(self.mesh, self._sharding.ranks_of_group(runtime.world.size), runtime)
        self._groups = ShardGroups.of_mesh(self.mesh, runtime, self.ledger)
        # A copy of what lies in a file would take the memory that the file saves.
        self.saves_in_background = self._sharding.offload != FILE

    @property
    def _sharding(self) -> FSDPConfig:
        return cast(FSDPConfig, self.options)

    @property
    @override
    def layout(self) -> dict[str, Any]:
        return {**super().layout, "shard": self._shard}

    @override
    @classmethod
    def check(cls, config: Config, world_size: int) -> None:
        cast(FSDPConfig, cls.options_of(config)).check(config, world_size)

    @override
    @classmethod
    def state_shares(cls, config: Config, world_size: int) -> dict[str, float]:
        sharding = cast(FSDPConfig, cls.options_of(config))
        shares = options.shares(sharding.shard, sharding.ranks_of_group(world_size))
        if sharding.offload != KEPT:
            # Of the optimizer's state that of the block that is updated, which is small.
            shares["optimizer"] = 0.0
        if sharding.offload != KEPT and sharding.shard == FULL:
            # Averages stay.
            copies = copies_of_parameters(config)
            shares["parameters"] *= copies / (1 + copies)
        if cls._adds_up_whole_gradients(config, world_size):
            shares["gradients"] += 1.0
        return shares

    @override
    @classmethod
    def gathered_bytes(cls, config: Config, parameter_bytes: int) -> float:
        sharding = cast(FSDPConfig, cls.options_of(config))
        if sharding.shard != FULL:
            return 0.0
        block = min(module_blocks.block_limit(sharding.block_mb, parameter_bytes), parameter_bytes)
        # Two blocks of parameters, since one is gathered ahead, or all; and the gradients of a block.
        return block + (min(2 * block, parameter_bytes) if sharding.reshard_after_forward else parameter_bytes)

    @classmethod
    def _adds_up_whole_gradients(cls, config: Config, world_size: int) -> bool:
        """Whether a rank holds all gradients until the last pass of a step, and its part of their sum besides."""
        sharding, shards = cast(FSDPConfig, cls.options_of(config)), cls.data_parallel_size(config, world_size)
        pieces = accumulated_pieces(config.trainer.largest_pass, config.data.batch_size, shards)
        return sharding.shard != OPTIMIZER and pieces > 1

    # --- set-up ------------------------------------------------------------------------------------------------------

    @override
    @classmethod
    def most_trial_bytes(cls, config: Config) -> float:
        is_full = cast(FSDPConfig, cls.options_of(config)).shard == FULL
        return _MOST_TRIAL_MB * MIB if is_full else super().most_trial_bytes(config)

    @override
    def setup(self, model: nn.Module, task: Task, make_optimizer: MakeOptimizer, example: Tensor) -> None:
        if self._shard == FULL and parameter_bytes(model) > _MOST_TRIAL_MB * MIB and self.runtime.device.type == "cpu":
            return_large_blocks()
        self._fill(model.named_buffers())
        # Before ddp exchanges layers that communicate.
        self._module_blocks = self._choose_module_blocks(model, example) if self._shard == FULL else []
        super().setup(model, task, make_optimizer, example)
        self.initial_values = None

    @override
    def sync_initial_state(self, model: nn.Module, communicator: Communicator) -> None:
        # Ranks that compute values part by part have compared what they compute them from.
        if self.initial_values is None:
            super().sync_initial_state(model, communicator)

    def _fill(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Computes the values of hollow tensors on each rank; what initialises a model may raise anything."""
        values = self.initial_values
        if values is not None:
            agreed(self._setup_ranks, self.runtime, lambda: values.fill(dict(named)))

    def _choose_module_blocks(self, model: nn.Module, example: Tensor) -> list[ModuleBlock]:
        inputs = example.new_zeros(module_blocks.OBSERVED_SAMPLES, *example.shape[1:])
        if self.initial_values is not None:
            with self.precision.autocast():
                root, problem = module_blocks.observe(model, inputs, shapes_only=True)
            if problem := self._why_not_part_by_part(model, problem):
                log.warning("each rank begins with the whole model: %s", problem)
                self._fill(model.named_parameters())
                self.initial_values = None
        if self.initial_values is None:
            with self.precision.autocast():
                root, problem = module_blocks.observe(model, inputs)
            module_blocks.warn_if(problem)
        chosen = module_blocks.blocks_of_model(model, root, self._sharding.block_mb)
        return module_blocks.agreed(chosen, self.replicas, self.runtime.device)

    def _why_not_part_by_part(self, model: nn.Module, problem: str) -> str:
        """Why not all ranks can compute the initial values of their parts alone; all ranks call it together.

        Args:
            model: Has hollow tensors.
            problem: Why this rank could not observe it; empty if it could.
        """
        values = self.initial_values
        assert values is not None
        known = [tensor for _, tensor in named_tensors(model) if not values.is_hollow(tensor)]
        own = {"problem": problem, "drawn": int(digest([values.summary(), *known]))}
        ranks = self.replicas.all_gather_json(own, self.runtime.device)
        problems = [str(each["problem"]) for each in ranks if each["problem"]]
        if not problems and any(each["drawn"] != ranks[0]["drawn"] for each in ranks):
            problems = ["its initial parameters depend on the rank"]
        return "".join(problems[:1])

    @override
    def _make_gradients(self) -> ReducedGradients:
        named = dict(self.model.named_parameters())
        if self._shard == FULL:
            parts = [[(name, named[name]) for name in block.parameters] for block in self._module_blocks]
        else:
            sizes = self._choose_bucket_sizes()
            parts = split_into_buckets(list(named.items())[::-1], *(size * MIB for size in sizes))
        self._sharded = agreed(self._setup_ranks, self.runtime, lambda: self._divide_update(parts))
        blocks = self._sharded.blocks
        gradients: ReducedGradients
        if self._shard == OPTIMIZER:
            gradients = Gradients(named.items(), self.replicas, self.compressor, self.stopwatch, *sizes)
        elif self._shard == FULL:
            reshards = self._sharding.reshard_after_forward
            self._gatherer = self._make_gatherer(self._module_blocks, reshards=reshards)
            gradients = ScatteredGradients(blocks[::-1], self._groups, self.stopwatch, self._gatherer.pass_over)
        else:
            gradients = ScatteredGradients(blocks, self._groups, self.stopwatch)
        self._sharded.assign_gradients([gradients])
        self._log_setup()
        return gradients

    def _divide_update(self, parts: Sequence[Sequence[tuple[str, nn.Parameter]]]) -> ShardedUpdate:
        """Makes blocks of parameters, and memory for this rank's parts of them."""
        value_of = None
        if self._shard == FULL:
            value_of = torch.detach if self.initial_values is None else self.initial_values.value
        with offload.room(self._sharding):
            self._offload = offload.choose(self._sharding, self.runtime.device)
            return ShardedUpdate([self.model], parts, self._groups.shards, self.freezing, value_of, self._offload)

    @override
    def _make_optimizer(self, make: MakeOptimizer, updated: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        with offload.room(self._sharding):
            return self._offload.make_optimizer(make, self._sharded.slices_of_blocks)

    @override
    def _expected_optimizer_bytes(self, make: MakeOptimizer, updated: list[tuple[str, nn.Parameter]]) -> int:
        return self._offload.expected_bytes(make, self._sharded.slices_of_blocks)

    @override
    def held_tensors(self) -> dict[str, list[Tensor]]:
        found = self._kept_tensors()
        return {kind: [each for each in tensors if self._offload.holds(each)] for kind, tensors in found.items()}

    def _kept_tensors(self) -> dict[str, list[Tensor]]:
        """What this rank keeps between steps, wherever that is."""
        kept = super().held_tensors()
        self._sharded.add_held(kept)
        return kept

    @override
    def report(self) -> dict[str, Any]:
        found = super().report()
        if self._sharding.offload != KEPT:
            tensors = self._kept_tensors()
            elsewhere = {kind: [each for each in of if not self._offload.holds(each)] for kind, of in tensors.items()}
            sizes = bytes_by_kind(elsewhere)
            total = torch.tensor([*sizes.values()], dtype=torch.float64, device=float64_device(self.runtime.device))
            largest = self.replicas.all_reduce(total, "max").tolist()
            megabytes = {kind: round(size / MIB, 1) for kind, size in zip(sizes, largest, strict=True) if size}
            found["offloaded"] = {"to": self._sharding.offload, "mb": megabytes}
        return found

    @override
    def _bytes_of_passes(self) -> int:
        """Of parameters two blocks (one is gathered ahead) or all; of gradients those of a block or all."""
        if self._shard == OPTIMIZER:
            return 0
        sizes = sorted((block.bytes for block in self._sharded.blocks), reverse=True)
        gathered = sizes[:2] if self._sharding.reshard_after_forward else sizes
        whole = self._adds_up_whole_gradients(self.config, self.runtime.world.size)
        unsent = self._sharded.trained_bytes if whole else sum(sizes[:1])
        return unsent + (0 if self._gatherer is None else sum(gathered))

    def _log_setup(self) -> None:
        blocks = self._sharded.blocks
        largest = max((block.bytes for block in blocks), default=0)
        log.info(
            "shard=%s: parameters in blocks (%d) of up to %.2g MiB, each divided among %d of %d ranks%s",
            self._shard,
            len(blocks),
            largest / MIB,
            self._groups.shards.size,
            self.runtime.world.size,
            self._sharding.offload_line(),
        )

    # --- state -------------------------------------------------------------------------------------------------------

    @override
    def kept_parameters(self) -> dict[str, Tensor]:
        if self._gatherer is None:
            return super().kept_parameters()
        return self._sharded.kept_slices()

    @override
    def part_of(self, name: str, whole: Tensor) -> Tensor:
        return whole if self._gatherer is None else self._sharded.slice_of(name, whole)

    @override
    def saved_part(self, name: str, kept: Tensor) -> Tensor:
        return self._sharded.saved_part(name, kept, self.runtime.device, sliced=self._gatherer is not None)

    @override
    def state_dict(self) -> dict[str, Any]:
        self._prepare_model_state()
        # A module that saves its state in its own way needs all its parameters for that.
        with nullcontext() if module_state.has_plain_state(self.model) else self._whole_model():
            state = self._saved({}, {})
            self._sharded.add_to(state, self.optimizer, self.runtime.device, saves=self._groups.replicas.rank == 0)
        if self._shard == OPTIMIZER:
            state["scalars"]["buckets"] = self._bucket_sizing.state_dict()
        return state

    @override
    def load_state_dict(self, saved: Mapping[str, Any]) -> list[RestoredPart]:
        if self._shard == OPTIMIZER and self.is_arranged_as(saved["layout"]):
            self._bucket_sizing.load_state_dict(saved["scalars"].get("buckets"))
            self._rebuild_buckets()
        named_state.check_optimizer(self.config.optimizer.name, saved["scalars"])
        self._load_model(*self.module_state_of(saved))
        self._load_optimizer(saved["optimizer"], saved["scalars"]["optimizer"])
        names = [name for name, _ in self.model.named_parameters()]
        return [
            *named_state.restored_parts(saved, self.precision.dtype),
            self.precision.load_state_dict(saved["scalars"]["precision"]),
            *self.restore_compressor(saved, names, self.replicas.size),
        ]
