"""Measures on these ranks what a training costs: steps, blocks, compressors and links."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distrain.communication.collectives import Communicator, digest
from distrain.communication.types import Reduction
from distrain.compression import base as compression
from distrain.compression.autotune.compressor_cost import CompressorCost, measure_cost
from distrain.compression.autotune.step_trace import synchronised_time
from distrain.config.groups import CompressionConfig
from distrain.data.base import Splits
from distrain.data.batch import Batch
from distrain.errors import ConfigError, config_error
from distrain.gradients.bucket_sizes import MIB, AllReduceCost, choose_sizes, gradient_bytes_of
from distrain.gradients.buckets import make_bucket, split_into_buckets
from distrain.gradients.trainable_parameters import trainable_parameters
from distrain.models.foreign import auxiliary_weight
from distrain.models.freezing import freeze_schedule, train_only
from distrain.models.layers import layer_depths
from distrain.optim.optimizers.build import build_optimizer
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.strategies.base import Strategy
from distrain.strategies.batchnorm import defer_running_statistics, synchronise_batchnorm
from distrain.strategies.pipeline import split
from distrain.strategies.pipeline.block_costs import BlockCost, measure_blocks
from distrain.strategies.single import Single
from distrain.tools.planning.cluster import Cluster, expected_maximum
from distrain.tools.planning.cluster_measurement import Rank, measure_cluster, processors
from distrain.tools.planning.robust_mean import median_of_means
from distrain.tools.planning.structure import BlockStructure, pipeline_options, possible_starts, structures
from distrain.tools.planning.workload import BlockProfile, Workload
from distrain.torch_internals import BatchNorm
from distrain.training import auto_format
from distrain.training.assembly import build_loader, build_model
from distrain.training.run_plan import RunPlan

#: Seconds of steps of one size, and the fewest steps.
_STEP_SECONDS, _FEWEST = 1.5, 3
#: Seconds of a step, above which it is measured on fewer samples.
_LONGEST_STEP = 1.0
#: Of a pass over all blocks so many are timed, at most in so many seconds.
_BLOCK_REPEATS, _BLOCK_SECONDS = 5, 4.0
#: Fewest samples of a measured step: BatchNorm layers need two, and a line through times needs two sizes.
_FEWEST_SAMPLES = 4
#: Times that the gradients are copied.
_COPIES = 5
#: Numbers of parts into which a model that is no sequence of blocks is cut, as far as it can be.
_PARTS = (8, 4, 2)


@dataclass(frozen=True)
class Measured:
    """The result of measuring.

    Attributes:
        workload: The training, with the times of one rank that computes alone on its machine.
        cluster: These ranks.
        remarks: What could not be measured, and why.
    """

    workload: Workload
    cluster: Cluster
    remarks: list[str]


@dataclass
class _StepTimes:
    """Seconds of steps with one number of samples.

    Attributes:
        loading: Waiting for the next batch.
        passes: Forward and backward passes.
    """

    loading: float
    passes: float


def measure(
    plan: RunPlan,
    world: World,
    splits: Splits,
    compressors: Mapping[str, CompressionConfig],
    most_samples: int | None = None,
) -> Measured:
    """Measures; all ranks call it together.

    Args:
        plan: The training as one process does it.
        world: This rank's place among those that measure.
        splits: The samples.
        compressors: Configurations of the compressors to time.
        most_samples: Most samples of a measured step; ``None``: a rank's share of a batch.

    Returns:
        What this rank measured; what ranks measure together is the same on all of them.

    Raises:
        ConfigError: Hosts have different numbers of ranks.
    """
    with Runtime(plan.config, world, keep_logs=False) as runtime:
        hosts = _ranks_of_hosts(runtime, world)
        if len(set(hosts.values())) == 1:
            # As a run chooses them where its configuration says auto.
            make_model = functools.partial(build_model, plan, splits)
            plan = plan.with_config(auto_format.resolve_auto(plan.config, runtime, splits, plan.task, make_model))
            return _Measurement(plan, world, splits, runtime, len(hosts)).measure(compressors, most_samples)
    # Not inside, where an error means that this rank alone has failed.
    raise config_error("plan", f"hosts have different numbers of ranks: {hosts}; a plan needs the same number on each")


def _ranks_of_hosts(runtime: Runtime, world: World) -> dict[str, int]:
    """Number of ranks on each host; all ranks call it together."""
    rows = runtime.communicator().all_gather_json({"host": world.host}, runtime.device)
    return dict(Counter(str(row["host"]) for row in rows))


class _Measurement:
    """What one rank does."""

    def __init__(self, plan: RunPlan, world: World, splits: Splits, runtime: Runtime, hosts: int) -> None:
        # Steps are measured in one piece.
        trainer = dataclasses.replace(plan.config.trainer, micro_batch_size=None)
        self._plan = plan.with_config(dataclasses.replace(plan.config, trainer=trainer))
        self._micro_batch_size = plan.config.trainer.micro_batch_size
        self._world, self._splits, self._runtime = world, splits, runtime
        self._everyone = runtime.communicator()
        self._device = runtime.device
        self._hosts = hosts
        self._remarks: list[str] = []

    def measure(self, compressors: Mapping[str, CompressionConfig], most_samples: int | None) -> Measured:
        ranks, batch_size = self._world.size, min(self._plan.config.data.batch_size, len(self._splits.train))
        strategy = self._strategy()
        sizes = self._sizes(strategy, batch_size, most_samples)
        largest = sizes[-1]
        self._sequence_of_model = self._sequence(strategy)
        update = self._agree(self._update_seconds(strategy))
        alone = self._alone(strategy, largest)
        steps = {size: self._steps(strategy, size, update) for size in sizes}
        costs = {size: self._blocks(strategy, size) for size in sizes}
        found, begins = self._structure(strategy, sizes[0])
        factors = [
            self._batchnorm_factor(strategy.model, change, largest, update, steps[largest].passes)
            for change in (synchronise_batchnorm, defer_running_statistics)
        ]
        copying, hashing = (self._agree(seconds) for seconds in self._copy_seconds(strategy.model))
        one = steps[largest]
        spread = self._spread(strategy, largest, one.loading + one.passes + update) if ranks > 1 else 0.0
        rank = Rank(self._runtime, self._world, self._hosts)
        cluster = measure_cluster(rank, strategy.model, alone, one.passes, spread)
        parts = self._bucket_parts(strategy.model, cluster.all_reduce_cost)
        times = {name: self._compressor(parts, own) for name, own in compressors.items()} if ranks > 1 else {}
        crowd = cluster.slowdown_of(cluster.ranks_per_machine)
        # What takes less time than a rank's turn on a processor was timed while no more ranks computed than there are
        # processors.
        briefly = cluster.slowdown_of(min(cluster.ranks_per_machine, processors()))
        workload = Workload(
            self._profiles(costs, steps, found, begins, crowd),
            batch_size,
            {size: steps[size].loading / crowd for size in sizes},
            update / briefly,
            float(_optimizer_bytes(strategy.optimizer)),
            self._micro_batch_size,
            factors[0],
            {name: _divided(cost, briefly) for name, cost in times.items()},
            max(ranks, 2),
            compressed_bytes=tuple(4 * _numel(part) for part in parts),
            copy_seconds=copying / briefly,
            digest_seconds=hashing / briefly,
            deferred_factor=factors[1],
            keeping_residuals=frozenset(name for name, one in compressors.items() if _keeps_residuals(one)),
        )
        return Measured(workload, cluster, self._remarks)

    def _sizes(self, strategy: Single, batch_size: int, most_samples: int | None) -> list[int]:
        """The two numbers of samples to measure, in ascending order; one if there are no more samples."""
        share = -(-batch_size // self._world.size) if most_samples is None else most_samples
        piece = min(share, self._micro_batch_size or share)
        largest = min(max(piece, _FEWEST_SAMPLES), len(self._splits.train))
        batches = self._batches(strategy, min(2, largest))
        self._step(strategy, batches)
        one = self._agree(sum(self._step(strategy, batches))) / min(2, largest)
        # Where a sample takes long, what a pass takes beside its samples is little.
        largest = min(largest, max(int(_LONGEST_STEP / one), 2))
        return sorted({max(largest // 4, min(largest, 2)), largest})

    # --- the training ------------------------------------------------------------------------------------------------

    def _strategy(self, change: Callable[[nn.Module, Communicator], int] | None = None) -> Single:
        """One process's training, in this rank.

        Args:
            change: Changes the BatchNorm layers.
        """
        plan = self._plan
        strategy = Single(plan.config, self._runtime)
        if self._splits.class_weights is not None:
            plan.task.set_class_weights(self._splits.class_weights)
        model = build_model(plan, self._splits)
        if change is not None:
            change(model, Communicator())
        strategy.freezing = freezing = freeze_schedule(plan.config, model)
        if freezing is not None:
            train_only(model, freezing.ever_trained, freezing.parameters)
        self._layout = plan.memory_format(model)
        make_optimizer = functools.partial(
            build_optimizer, plan.config.optimizer, steps_per_epoch=100, total_steps=1000, depths=layer_depths(model)
        )
        strategy.setup(model, plan.task, make_optimizer, self._batch(strategy, 2).inputs)
        if freezing is not None:
            strategy.set_trained(freezing.ever_trained)
        return strategy

    def _batches(self, strategy: Strategy, size: int) -> Iterator[Batch]:
        """Batches of a number of samples, without end."""
        data = dataclasses.replace(self._plan.config.data, batch_size=size)
        plan = self._plan.with_config(dataclasses.replace(self._plan.config, data=data))
        loader = build_loader(plan, strategy, self._splits, self._splits.train, self._layout, training=True)
        batches = itertools.chain.from_iterable(loader.epoch(epoch) for epoch in itertools.count())
        # The last batch of an epoch may be smaller.
        whole = min(size, len(self._splits.train))
        return (batch for batch in batches if len(batch) == whole)

    def _batch(self, strategy: Strategy, size: int) -> Batch:
        return next(self._batches(strategy, size))

    # --- steps -------------------------------------------------------------------------------------------------------

    def _steps(self, strategy: Single, size: int, update: float, *, together: bool = True) -> _StepTimes:
        """Times steps on batches of a number of samples.

        Args:
            strategy: Takes the steps.
            size: Number of samples.
            update: Seconds of the optimizer.
            together: All ranks do so at the same time, and begin and end together.
        """
        batches = self._batches(strategy, size)
        first = self._step(strategy, batches)
        longest = self._agree(sum(first)) if together else sum(first)
        seconds = max(_STEP_SECONDS, _FEWEST * longest)
        times: list[tuple[float, float]] = []
        begin = time.perf_counter()
        # For a time and not for a number of steps: where ranks outnumber processors some are faster for a while, and
        # what the others take after those have ended says nothing.
        while len(times) < _FEWEST or time.perf_counter() - begin < seconds:
            times.append(self._step(strategy, batches))
        loading = median_of_means([loaded for loaded, _ in times])
        passes = max(median_of_means([taken for _, taken in times]) - update, 0.0)
        if together:
            # The slowest rank's, for which the others wait sooner or later.
            loading, passes = (self._agree(value) for value in (loading, passes))
        return _StepTimes(loading, passes)

    def _spread(self, strategy: Single, size: int, free: float) -> float:
        """By how much ranks that wait for each other after each step are slower, as a standard deviation.

        Args:
            strategy: Takes the steps.
            size: Number of samples of a step.
            free: Seconds of a step of ranks that don't wait.

        Returns:
            The standard deviation of a rank's step, relative to its mean, with which the slowest of these ranks would
            be as late as it is.
        """
        batches = self._batches(strategy, size)
        count = max(_FEWEST, int(_STEP_SECONDS / free))
        steps, barriers = [], []
        for _ in range(count):
            begin = synchronised_time(self._device)
            self._step(strategy, batches)
            self._everyone.barrier()
            middle = synchronised_time(self._device)
            self._everyone.barrier()
            steps.append(middle - begin)
            barriers.append(synchronised_time(self._device) - middle)
        lateness = median_of_means(steps) - statistics.median(barriers) - free
        mean = self._agree(lateness, "sum") / self._world.size
        return max(mean, 0.0) / free / expected_maximum(self._world.size)

    def _step(self, strategy: Single, batches: Iterator[Batch]) -> tuple[float, float]:
        """Seconds of waiting for the batch, and of the rest."""
        begin = synchronised_time(self._device)
        batch = next(batches)
        middle = synchronised_time(self._device)
        strategy.train_step(batch)
        return middle - begin, synchronised_time(self._device) - middle

    def _alone(self, strategy: Single, size: int) -> float:
        """Seconds of the passes while all other ranks wait."""
        passes = 0.0
        if self._world.rank == 0:
            passes = self._steps(strategy, size, self._update_seconds(strategy), together=False).passes
        return self._agree(passes)

    def _update_seconds(self, strategy: Single) -> float:
        """Seconds of the optimizer."""
        strategy.train_step(self._batch(strategy, 2))
        times = []
        for _ in range(4):
            begin = synchronised_time(self._device)
            strategy.optimizer.step()
            times.append(synchronised_time(self._device) - begin)
        return statistics.median(times[1:])

    def _batchnorm_factor(
        self, model: nn.Module, change: Callable[[nn.Module, Communicator], int], size: int, update: float, plain: float
    ) -> float:
        """How much longer passes take with changed BatchNorm layers."""
        if self._world.size == 1 or not plain:
            return 1.0
        if not any(isinstance(layer, BatchNorm) for layer in model.modules()):
            return 1.0
        return max(self._steps(self._strategy(change), size, update).passes / plain, 1.0)

    def _copy_seconds(self, model: nn.Module) -> tuple[float, float]:
        """Seconds of copying, and of hashing, as many bytes as all gradients have."""
        parameters = list(trainable_parameters(model).values())
        source, target = (torch.cat([one.detach().flatten() for one in parameters]) for _ in range(2))
        times = []
        for _ in range(_COPIES):
            begin = synchronised_time(self._device)
            target.copy_(source)
            middle = synchronised_time(self._device)
            digest([source])
            times.append((middle - begin, synchronised_time(self._device) - middle))
        copying, hashing = (statistics.median(column) for column in zip(*times[1:], strict=True))
        return copying, hashing

    # --- blocks ------------------------------------------------------------------------------------------------------

    def _sequence(self, strategy: Single) -> nn.Sequential:
        """The model as a sequence of blocks; a single one if it can't be cut."""
        example = self._batch(strategy, 2).inputs
        auxiliary = auxiliary_weight(self._plan.config.model) > 0
        for parts in _PARTS:
            try:
                return split.as_sequence(
                    strategy.model, example, strategy.precision, pipeline_options(parts), auxiliary=auxiliary
                )
            except ConfigError as error:
                reason = str(error)
        self._remarks.append(f"no pipelines: {reason}")
        return nn.Sequential(strategy.model)

    def _blocks(self, strategy: Single, size: int) -> list[BlockCost]:
        """Times each block on a number of samples."""
        inputs = self._batch(strategy, size).inputs
        begin = time.perf_counter()
        once = measure_blocks(self._sequence_of_model, inputs, strategy.precision.autocast, 1)
        longest = self._agree((time.perf_counter() - begin) / 2)
        repeats = min(int(_BLOCK_SECONDS / longest), _BLOCK_REPEATS)
        if repeats < 2:
            return once
        return measure_blocks(self._sequence_of_model, inputs, strategy.precision.autocast, repeats)

    def _structure(self, strategy: Single, size: int) -> tuple[list[BlockStructure], set[int]]:
        """What each block consists of, and the blocks that may begin a stage."""
        begins, problem = possible_starts(self._sequence_of_model, self._batch(strategy, 2).inputs, strategy.precision)
        if problem and not self._remarks:
            self._remarks.append(f"no pipelines: {problem}")
        return structures(self._sequence_of_model, self._batch(strategy, size).inputs, strategy.precision), begins

    def _profiles(
        self,
        costs: Mapping[int, Sequence[BlockCost]],
        steps: Mapping[int, _StepTimes],
        found: Sequence[BlockStructure],
        begins: set[int],
        crowd: float,
    ) -> tuple[BlockProfile, ...]:
        """Blocks whose times add up to those of whole passes."""
        scale = {}
        for size, blocks in costs.items():
            whole = sum(cost.forward_ms + cost.backward_ms for cost in blocks) / 1000
            # What a block takes alone differs from its part of a whole pass, whose caches others have filled.
            agreed = self._agree(whole, "sum") / self._world.size
            scale[size] = steps[size].passes / max(agreed, 1e-9) / crowd
        largest = max(costs)
        profiles = []
        for index, cost in enumerate(costs[largest]):
            profiles.append(
                BlockProfile(
                    cost.name,
                    found[index].gradients,
                    {size: costs[size][index].forward_ms / 1000 * scale[size] for size in costs},
                    {size: costs[size][index].backward_ms / 1000 * scale[size] for size in costs},
                    found[index].saved_bytes,
                    cost.output_bytes / largest,
                    cost.output_tensors,
                    found[index].flops,
                    found[index].batchnorms,
                    index in begins,
                    found[index].state_bytes,
                    found[index].kernels,
                )
            )
        return tuple(profiles)

    # --- compressors -------------------------------------------------------------------------------------------------

    def _compressor(
        self, parts: Sequence[Sequence[tuple[str, nn.Parameter]]], config: CompressionConfig
    ) -> CompressorCost:
        """A compressor's work on buckets of some parameters each."""
        compressor = compression.build(config, self._plan.config.seed)
        buckets = [make_bucket(list(part), compressor) for part in parts]
        torch.manual_seed(0)
        for bucket in buckets:
            bucket.flat.normal_(std=1e-3)
        for _ in range(compressor.warmup_steps):
            compressor.begin_step()
        return measure_cost(compressor, buckets, self._everyone)

    def _bucket_parts(self, model: nn.Module, cost: AllReduceCost | None) -> list[list[tuple[str, nn.Parameter]]]:
        """The parameters of buckets on which compressors are timed: all of them, and two of those that a run has."""
        parameters = list(trainable_parameters(model).items())
        if cost is None:
            return [parameters]
        sizes = [size * MIB for size in choose_sizes(cost, gradient_bytes_of(model))]
        parts = sorted(split_into_buckets(parameters[::-1], *sizes), key=_numel)
        return [parameters] if len(parts) == 1 else [parameters, parts[-1], parts[0]]

    # --- agreement ---------------------------------------------------------------------------------------------------

    def _agree(self, value: float, reduction: Reduction = "max") -> float:
        """The largest value of all ranks, or their sum."""
        tensor = torch.tensor([value], dtype=torch.float64, device=self._device)
        return float(self._everyone.all_reduce(tensor, reduction)) if self._world.size > 1 else value


def _optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's state."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _numel(parameters: Sequence[tuple[str, nn.Parameter]]) -> int:
    return sum(parameter.numel() for _, parameter in parameters)


def _keeps_residuals(config: CompressionConfig) -> bool:
    return compression.build(config).residuals is not None


def _divided(cost: CompressorCost, crowd: float) -> CompressorCost:
    buckets = [dataclasses.replace(bucket, work=[work / crowd for work in bucket.work]) for bucket in cost.buckets]
    return CompressorCost(buckets)
