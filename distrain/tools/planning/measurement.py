"""Measures on these ranks what a training costs: steps, blocks, compressors and links."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from distrain.communication.collectives import Communicator
from distrain.communication.types import Reduction
from distrain.config.groups import CompressionConfig
from distrain.data.base import Splits
from distrain.data.batch import Batch
from distrain.errors import ConfigError, config_error
from distrain.health.process import boot_id
from distrain.models.foreign import auxiliary_weight
from distrain.models.freezing import freeze_schedule, train_only
from distrain.models.layers import layer_depths
from distrain.optim.optimizers.build import build_optimizer
from distrain.runtime.agreement import agreed
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.strategies.base import Strategy
from distrain.strategies.batchnorm import defer_running_statistics, synchronise_batchnorm
from distrain.strategies.pipeline import split
from distrain.strategies.pipeline.block_costs import BlockCost, measure_blocks
from distrain.strategies.single import Single
from distrain.tools.planning.batchnorm_cost import Change, extra_seconds, lateness_of_collectives
from distrain.tools.planning.cluster import Cluster
from distrain.tools.planning.cluster_measurement import Rank, measure_cluster, processors
from distrain.tools.planning.compressor_measurement import measure_compressors
from distrain.tools.planning.divided_model import (
    DividedLayers,
    Divisions,
    divide_model,
    measure_divided,
    measure_each,
)
from distrain.tools.planning.network import Network
from distrain.tools.planning.phases import PhaseClock
from distrain.tools.planning.plan_keys import planned_otherwise
from distrain.tools.planning.step_timer import StepTimer, StepTimes, copy_seconds
from distrain.tools.planning.steps.common import BATCHNORM_BYTES
from distrain.tools.planning.structure import (
    BlockStructure,
    memory_of,
    pipeline_options,
    possible_starts,
    shared_looks,
    structures,
)
from distrain.tools.planning.workload import BlockProfile, DividedModel, Workload
from distrain.torch_internals import BatchNorm
from distrain.training import auto_format
from distrain.training.assembly import build_loader, build_model
from distrain.training.run_plan import RunPlan

#: Seconds of a step, above which it is measured on fewer samples; and of one that has all samples of a rank.
_LONGEST_STEP, _LONGEST_WHOLE_STEP = 1.0, 2.0
#: Of a pass over all blocks so many are timed, at most in so many seconds.
_BLOCK_REPEATS, _BLOCK_SECONDS = 5, 4.0
#: Fewest samples of a measured step: BatchNorm layers need two, and a line through times needs two sizes.
_FEWEST_SAMPLES = 4
#: Fewest microbatches of a planned pipeline, which has the largest ones.
_FEWEST_MICROBATCHES = 2
#: What ``ddp`` and pipelines make of BatchNorm layers.
_BATCHNORMS: Mapping[str, Change] = {"synchronised": synchronise_batchnorm, "deferred": defer_running_statistics}
#: Seconds of steps with BatchNorm layers that communicate, and most of these steps.
_BATCHNORM_SECONDS, _MOST_BATCHNORM_STEPS = 1.5, 50
#: Of divided layers, a step is measured on at most so many times the samples of a step of whole layers.
_MOST_TIMES = 4
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


def measure(
    plan: RunPlan,
    world: World,
    splits: Splits,
    compressors: Mapping[str, CompressionConfig],
    clock: PhaseClock,
    most_samples: int | None = None,
    divisions: Divisions | None = None,
) -> Measured:
    """Measures; all ranks call it together.

    Args:
        plan: The training as one process does it.
        world: This rank's place among those that measure.
        splits: The samples.
        compressors: Configurations of the compressors to time.
        clock: Times the phases.
        most_samples: Most samples of a measured step; ``None``: a rank's share of a batch.
        divisions: The training with divided layers, to measure it too; ``None``: it isn't asked for.

    Returns:
        What this rank measured; what ranks measure together is the same on all of them.

    Raises:
        ConfigError: Hosts have different numbers of ranks.
    """
    with Runtime(plan.config, world, keep_logs=False) as runtime:
        mine = {"host": world.host, "machine": boot_id() or world.host, "processors": processors()}
        rows = runtime.communicator().all_gather_json(mine, runtime.device)
        hosts = dict(Counter(str(row["host"]) for row in rows))
        if len(set(hosts.values())) == 1:
            # As a run chooses them where its configuration says auto.
            make_model = functools.partial(build_model, plan, splits)
            with clock.phase("formats"):
                plan = plan.with_config(auto_format.resolve_auto(plan.config, runtime, splits, plan.task, make_model))
            machines, fewest = len({row["machine"] for row in rows}), min(row["processors"] for row in rows)
            rank = Rank(runtime, world, len(hosts), machines, fewest)
            return _Measurement(plan, splits, rank).measure(compressors, most_samples, clock, divisions)
    # Not inside, where an error means that this rank alone has failed.
    raise config_error("plan", f"hosts have different numbers of ranks: {hosts}; a plan needs the same number on each")


class _Measurement:
    """What one rank does."""

    def __init__(self, plan: RunPlan, splits: Splits, rank: Rank) -> None:
        # Steps are measured in one piece and with one gradient.
        trainer = dataclasses.replace(plan.config.trainer, micro_batch_size=None)
        model = plan.config.model
        if model.checkpoint_activations == "auto":
            model = dataclasses.replace(model, checkpoint_activations="none")
        optimizer = dataclasses.replace(plan.config.optimizer, sam_rho=None)
        config = dataclasses.replace(plan.config, trainer=trainer, model=model, optimizer=optimizer)
        self._plan = plan.with_config(config)
        self._left_out = planned_otherwise(plan.config)
        self._micro_batch_size = plan.config.trainer.largest_pass
        self._sharpness = plan.config.optimizer.sam_rho
        self._rank, self._splits = rank, splits
        self._world, self._runtime = rank.world, rank.runtime
        self._everyone, self._device = rank.runtime.communicator(), rank.runtime.device
        self._remarks: list[str] = []

    def measure(
        self,
        compressors: Mapping[str, CompressionConfig],
        most_samples: int | None,
        clock: PhaseClock,
        divisions: Divisions | None,
    ) -> Measured:
        ranks, batch_size = self._world.size, min(self._plan.config.data.batch_size, len(self._splits.train))
        with clock.phase("model"):
            strategy = self._strategy()
            self._timer = self._timer_of(strategy)
            sizes, largest = self._sizes(batch_size, most_samples)
            self._sequence_of_model = self._sequence(strategy, strategy.model)
        with clock.phase("steps"):
            update = self._agree(self._timer.update_seconds())
            moving = 0.0 if self._sharpness is None else self._agree(self._timer.sharpness_seconds(self._sharpness))
            alone = self._alone(largest, update)
            steps = {size: self._timer.steps(size, update) for size in sizes}
        with clock.phase("blocks"):
            costs = {size: self._blocks(strategy, size, is_long=steps[size].is_long) for size in sizes}
            begins = self._possible_starts(strategy)
            # What is only counted needs no values, which would take longer than all else.
            found, changed = self._structures(strategy, sizes[:2], needs_values=not steps[largest].is_long)
        with clock.phase("steps again"):
            steps = {size: self._timer.steps_again(size, one, update, size == largest) for size, one in steps.items()}
        one = steps[largest]
        with clock.phase("links"):
            copying, hashing = (self._agree(seconds) for seconds in copy_seconds(strategy.model, self._device))
            spread = one.spread if ranks > 1 else 0.0
            if spread is None:
                spread = self._timer.spread(largest, one.loading + one.passes + update)
            cluster = measure_cluster(self._rank, strategy.model, alone, one.passes, spread)
            network = Network(cluster)
            small = self._agree(network.all_reduce(BATCHNORM_BYTES, network.group(ranks)).seconds)
        with clock.phase("batchnorm"):
            factors = self._batchnorm_factors(strategy, largest, one.passes)
            count = 0 if ranks == 1 else sum(block.batchnorms for block in found[min(found)])
            # In a step of all samples, each pass has as many collectives.
            whole = one.passes * max(batch_size / ranks / largest, 1.0)
            few = sizes[0] if one.is_long else largest
            added = functools.partial(self._collectives_seconds, few, steps[few].passes * factors[0], update)
            lateness = lateness_of_collectives(count, small, whole, added)
        with clock.phase("compressors"):
            own_work = measure_compressors(
                compressors, strategy.model, cluster.all_reduce_cost, self._everyone, self._plan.config.seed
            )
        crowd = cluster.slowdown_of(cluster.ranks_per_machine)
        # What takes less time than a rank's turn on a processor was timed while no more ranks computed than there are
        # processors.
        briefly = cluster.slowdown_of(min(cluster.ranks_per_machine, processors()))
        own_work = own_work.faster(briefly)
        workload = Workload(
            self._profiles(costs, steps, found, changed, begins, crowd),
            batch_size,
            {size: steps[size].loading / crowd for size in sizes},
            update / briefly,
            float(self._timer.optimizer_bytes()),
            self._micro_batch_size,
            factors[0],
            own_work.costs,
            max(ranks, 2),
            compressed_bytes=own_work.bucket_bytes,
            copy_seconds=copying / briefly,
            digest_seconds=hashing / briefly,
            deferred_factor=factors[1],
            batchnorm_latency=lateness,
            input_bytes=self._batch(strategy, largest).inputs.nbytes / largest,
            update_bytes=float(self._timer.update_bytes()),
            deterministic=self._plan.config.trainer.deterministic,
            keeping_residuals=own_work.keeping_residuals,
            rounds=1 if self._sharpness is None else 2,
            sharpness_seconds=moving / briefly,
        )
        if divisions is not None:
            with clock.phase("divided layers"):
                divided = self._divided(divisions, workload, cluster, largest, is_long=one.is_long)
            workload = dataclasses.replace(workload, divided=tuple(one.faster(crowd, briefly) for one in divided))
        return Measured(workload, cluster, [*self._remarks, *self._left_out])

    def _sizes(self, batch_size: int, most_samples: int | None) -> tuple[list[int], int]:
        """The numbers of samples to measure, in ascending order, and the one of a rank's whole step.

        These are two, or one if there are no more samples. If pipelines of all ranks have larger microbatches, there is
        one more.
        """
        share = -(-batch_size // self._world.size) if most_samples is None else most_samples
        piece = min(share, self._micro_batch_size or share)
        largest = min(max(piece, _FEWEST_SAMPLES), len(self._splits.train))
        one = self._timer.first_steps(min(2, largest)) / min(2, largest)
        # Where a sample takes long, what a pass takes beside its samples is little.
        possible = max(int(_LONGEST_STEP / one), 2)
        if one * largest <= _LONGEST_WHOLE_STEP:
            possible = max(possible, largest)
        if possible < min(largest, _FEWEST_SAMPLES):
            return [2], 2
        largest = min(largest, possible)
        half = -(-batch_size // _FEWEST_MICROBATCHES) if most_samples is None else largest
        microbatch = min(half, possible, self._micro_batch_size or half, len(self._splits.train))
        return sorted({max(largest // 4, min(largest, 2)), largest, max(microbatch, largest)}), largest

    def _alone(self, size: int, update: float) -> float:
        """Seconds of the passes while all other ranks wait."""
        passes = self._timer.steps(size, update, together=False).passes if self._world.rank == 0 else 0.0
        return self._agree(passes)

    # --- the training ------------------------------------------------------------------------------------------------

    def _strategy(self, change: Callable[[Single, nn.Module], None] | None = None) -> Single:
        """One process's training, in this rank.

        Args:
            change: Changes the model before.

        Raises:
            ConfigError: Of ``change``.
        """
        plan = self._plan
        strategy = Single(plan.config, self._runtime)
        if self._splits.class_weights is not None:
            plan.task.set_class_weights(self._splits.class_weights)
        model = build_model(plan, self._splits)
        strategy.freezing = freezing = freeze_schedule(plan.config, model)
        if freezing is not None:
            train_only(model, freezing.ever_trained, freezing.parameters)
        self._layout = plan.memory_format(model)
        if change is not None:
            change(strategy, model)
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

    def _timer_of(self, strategy: Single) -> StepTimer:
        batches = functools.partial(self._batches, strategy)
        return StepTimer(strategy, batches, self._everyone, self._device, takes_turns=self._rank.takes_turns)

    def _batch(self, strategy: Strategy, size: int) -> Batch:
        return next(self._batches(strategy, size))

    # --- parts of a step ----------------------------------------------------------------------------------------------

    def _batchnorm_factors(self, strategy: Single, size: int, passes: float) -> list[float]:
        """How much longer passes take with BatchNorm layers as they are under ``ddp``, and in pipelines."""
        if self._world.size == 1 or not passes:
            return [1.0] * len(_BATCHNORMS)
        inputs = self._batch(strategy, size).inputs

        def run() -> None:
            with strategy.precision.autocast():
                strategy.model(inputs)

        extra = extra_seconds(strategy.model, run, list(_BATCHNORMS.values()))
        return [1 + self._agree(seconds) / passes for seconds in extra]

    def _collectives_seconds(self, size: int, alone: float, update: float) -> float:
        """Seconds that collectives of all BatchNorm layers add to the passes of a step.

        Args:
            size: Samples of a pass.
            alone: Seconds of the passes of a step without these collectives.
            update: Seconds of the optimizer.
        """

        def change(_: Single, model: nn.Module) -> None:
            synchronise_batchnorm(model, self._everyone)

        timer = self._timer_of(self._strategy(change))
        count = min(max(int(_BATCHNORM_SECONDS / max(alone, 1e-9)), 2), _MOST_BATCHNORM_STEPS)
        return max(timer.passes_together(size, count, update) - alone, 0.0)

    def _divided(
        self, divisions: Divisions, workload: Workload, cluster: Cluster, largest: int, *, is_long: bool
    ) -> tuple[DividedModel, ...]:
        """Measures the model with divided layers, in each way that is wanted and possible.

        Args:
            divisions: Which ways, and how layers are divided.
            workload: The training of the whole model.
            cluster: These ranks.
            largest: Samples of the largest step of the whole model that was measured.
            is_long: That step takes long.
        """
        # Ranks have measured their blocks by themselves, and all must measure the same now.
        mine = {"wanted": divisions.wanted(workload, cluster)}
        wanted = self._everyone.all_gather_json(mine, self._device)[0]["wanted"]
        found, remarks = measure_each(
            wanted, functools.partial(self._divided_among, divisions, workload, largest, is_long)
        )
        self._remarks += remarks
        return found

    def _divided_among(
        self, divisions: Divisions, workload: Workload, largest: int, is_long: bool, ranks: int, starts: Sequence[int]
    ) -> tuple[DividedLayers, DividedModel]:
        """Measures one way of dividing layers: among so many ranks, for stages that begin with these blocks.

        Raises:
            ConfigError: On all ranks, if one of them can't divide the model.
        """
        layers: list[DividedLayers] = []
        config, short = divisions.config, not is_long

        def divide(strategy: Single, model: nn.Module) -> None:
            sequence, example = self._sequence(strategy, model), self._batch(strategy, 2).inputs
            layers.append(divide_model(config, ranks, starts, strategy, model, sequence, example, needs_values=short))

        strategy = agreed(self._everyone, self._runtime, lambda: self._strategy(divide))
        whole = self._micro_batch_size or self._plan.config.data.batch_size
        # A rank then computes about as much as in a step of the whole model, but for layers that stay whole.
        times = _MOST_TIMES if divisions.needs_times and not is_long else 1
        size = min(min(ranks, times) * largest, whole, len(self._splits.train))
        timer = self._timer_of(strategy)
        return layers[0], measure_divided(layers[0], strategy, workload, timer, self._batch(strategy, size))

    # --- blocks ------------------------------------------------------------------------------------------------------

    def _sequence(self, strategy: Single, model: nn.Module) -> nn.Sequential:
        """A model as a sequence of blocks; a single one if it can't be cut."""
        example = self._batch(strategy, 2).inputs
        auxiliary = auxiliary_weight(self._plan.config.model) > 0
        for parts in _PARTS:
            try:
                return split.as_sequence(
                    model, example, strategy.precision, pipeline_options(parts), auxiliary=auxiliary
                )
            except ConfigError as error:
                reason = str(error)
        if f"no pipelines: {reason}" not in self._remarks:
            self._remarks.append(f"no pipelines: {reason}")
        return nn.Sequential(model)

    def _blocks(self, strategy: Single, size: int, *, is_long: bool) -> list[BlockCost]:
        """Times each block on a number of samples."""
        inputs = self._batch(strategy, size).inputs
        autocast = strategy.precision.autocast
        if is_long:
            return measure_blocks(self._sequence_of_model, inputs, autocast, 1, warm_up=False)
        begin = time.perf_counter()
        once = measure_blocks(self._sequence_of_model, inputs, autocast, 1)
        longest = self._agree((time.perf_counter() - begin) / 2)
        repeats = min(int(_BLOCK_SECONDS / longest), _BLOCK_REPEATS)
        return measure_blocks(self._sequence_of_model, inputs, autocast, repeats) if repeats >= 2 else once

    def _possible_starts(self, strategy: Single) -> set[int]:
        """The blocks that may begin a stage."""
        begins, problem = possible_starts(self._sequence_of_model, self._batch(strategy, 2).inputs, strategy.precision)
        if problem and not self._remarks:
            self._remarks.append(f"no pipelines: {problem}")
        return begins

    def _structures(
        self, strategy: Single, sizes: Sequence[int], *, needs_values: bool
    ) -> tuple[dict[int, list[BlockStructure]], dict[str, list[BlockStructure]]]:
        """What each block consists of: ranks share the work, since all of them find the same.

        Args:
            strategy: The training.
            sizes: Numbers of samples.
            needs_values: As for :func:`structures`.

        Returns:
            By two numbers of samples, since what passes hold doesn't grow with the samples alone; and with other kinds
            of BatchNorm layers, for the smaller one.
        """
        if len(sizes) == 1:
            sizes = sorted({sizes[0], min(2 * sizes[0], len(self._splits.train))})
        ranks, changes = self._world.size, dict(_BATCHNORMS)
        if ranks == 1 or not any(isinstance(layer, BatchNorm) for layer in self._sequence_of_model.modules()):
            changes = {}
        looks: list[tuple[int, Change | None]] = [(size, None) for size in sizes]
        looks += [(min(sizes), change) for change in changes.values()]

        def look(index: int) -> list[BlockStructure]:
            size, change = looks[index]
            inputs = self._batch(strategy, size).inputs
            own = None if change is None else (lambda model: change(model, Communicator()))
            return structures(self._sequence_of_model, inputs, strategy.precision, own, needs_values=needs_values)

        found = shared_looks(len(looks), look, self._everyone, self._device)
        return dict(zip(sizes, found, strict=False)), dict(zip(changes, found[len(sizes) :], strict=True))

    def _profiles(
        self,
        costs: Mapping[int, Sequence[BlockCost]],
        steps: Mapping[int, StepTimes],
        found: Mapping[int, Sequence[BlockStructure]],
        changed: Mapping[str, Sequence[BlockStructure]],
        begins: set[int],
        crowd: float,
    ) -> tuple[BlockProfile, ...]:
        """Blocks whose times add up to those of whole passes."""
        scale = {}
        for size, blocks in costs.items():
            whole = sum(cost.forward_ms + cost.backward_ms for cost in blocks) / 1000
            # What a block takes alone differs from its part of a whole pass, whose caches others have filled.
            mean = self._agree(whole, "sum") / self._world.size
            scale[size] = steps[size].passes / max(mean, 1e-9) / crowd
        largest = max(costs)
        profiles = []
        for index, cost in enumerate(costs[largest]):
            forward = {size: costs[size][index].forward_ms / 1000 * scale[size] for size in costs}
            backward = {size: costs[size][index].backward_ms / 1000 * scale[size] for size in costs}
            profile = found[max(found)][index].profile(cost.name, forward, backward, memory_of(index, found, changed))
            profiles.append(
                dataclasses.replace(
                    profile,
                    output_bytes=cost.output_bytes / largest,
                    output_tensors=cost.output_tensors,
                    begins_stage=index in begins,
                )
            )
        return tuple(profiles)

    # --- agreement ---------------------------------------------------------------------------------------------------

    def _agree(self, value: float, reduction: Reduction = "max") -> float:
        """The largest value of all ranks, or their sum."""
        return self._timer.agree(value, reduction)
