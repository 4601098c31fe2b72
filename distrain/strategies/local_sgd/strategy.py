"""strategy=local_sgd: when ranks merge their copies of the model, and what they do between merges."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from distrain.checkpoint import module_state, named_state
from distrain.checkpoint.restore_report import RestoredPart
from distrain.communication.collectives import Communicator, ring_all_reduce_bytes
from distrain.compression.none import NoCompression
from distrain.config.groups import CompressionConfig
from distrain.config.registry import register
from distrain.config.schema import Config
from distrain.data.sampler import shard_bounds
from distrain.errors import ConfigError, config_error
from distrain.gradients.buckets import Gradients
from distrain.gradients.trainable_parameters import trainable_parameters
from distrain.runtime.consensus import AllReduceConsensus, Consensus, SingleRankConsensus
from distrain.strategies.base import MakeOptimizer, StepResult
from distrain.strategies.local_sgd.divergence_check import DivergenceCheck
from distrain.strategies.local_sgd.fragment import Fragment, SampleCount, outer_sgd, split_by_bytes, weighted_mean
from distrain.strategies.local_sgd.options import LocalSGDConfig
from distrain.strategies.named_buffers import NamedBuffers
from distrain.strategies.replicated import Replicated
from distrain.tasks.base import Task

if TYPE_CHECKING:
    from distrain.data.batch import Batch
    from distrain.runtime.runtime import Runtime


@register("strategy", "local_sgd", LocalSGDConfig)
class LocalSGD(Replicated[LocalSGDConfig]):
    """Every rank trains its own copy on its shard; every ``sync_every`` steps the copies are merged.

    Sources: local SGD, Stich 2019 (arXiv 1805.09767); synchronous first steps and hierarchical groups, Lin et al. 2020,
    post-local SGD (arXiv 1808.07217); the merged difference as the gradient of an outer optimizer, Douillard et al.
    2023, DiLoCo (arXiv 2311.08105); fragments in turn, overlapped merges and their mixing, Douillard et al. 2025,
    Streaming DiLoCo (arXiv 2501.18512, algorithm 2).

    A rank's step follows the mean gradient of *its own* samples, so its length doesn't depend on the number of ranks. A
    rank without samples skips the step. In a merge each copy is weighted by its samples since the last merge. After
    one step of plain SGD from equal parameters, sum of (n_r / n) (x - rate g_r) is x - rate (sum of (n_r / n) g_r),
    which is ddp's step however uneven the shares are. The gradient norm of ``trainer.grad_clip_norm``, the loss scale
    of fp16 and BatchNorm's statistics are each rank's own; the statistics are merged with the parameters, always by
    averaging.

    Evaluation, and ``model`` in a checkpoint, use the mean of all copies, with the weights of a merge at that time.
    Each rank's own copy is set aside meanwhile, so that evaluation does not change the training. A checkpoint also
    holds, in each rank's file, that rank's copy and optimizer: the same layout continues bit for bit. In another layout
    all copies start from the mean. The weighted differences from the mean add up to zero, so only the copies' spread is
    lost.

    With ``trainer.on_nonfinite=skip`` a rank whose gradient is not finite skips its own step. With ``rewind`` it does
    so too, and at one of the next merges all ranks rewind together. Ranks also agree on stops at merges only, where
    they wait for each other anyway.
    """

    compressed_quantity = "differences"

    def __init__(self, config: Config, runtime: Runtime) -> None:
        super().__init__(config, runtime)
        options = self.options
        runtime.activity.independent_steps = True
        ranks = runtime.world.size
        mesh = runtime.mesh({"data": ranks})
        self.replicas = Communicator(mesh.get_group("data") if mesh else None, self.ledger)
        self.data_shard = (self.replicas.rank, self.replicas.size)
        self.mesh, self._group, self._merge_group = mesh, Communicator(ledger=self.ledger), self.replicas
        if mesh and options.group_size is not None:
            self.mesh = runtime.mesh({"groups": ranks // options.group_size, "members": options.group_size})
            assert self.mesh is not None
            self._group = Communicator(self.mesh.get_group("members"), self.ledger)
        if mesh and options.overlap_steps:
            # A group of its own, since a merge that overlaps training must not delay the small messages of logging.
            self._merge_group = Communicator(runtime.duplicate_group(mesh, "data"), self.ledger)
        self._first_of_group = self.replicas.rank // self._group.size * self._group.size
        self._no_compression = NoCompression(CompressionConfig("none"))
        self._step = 0
        self._fragments: list[Fragment] = []
        #: This rank's copy while the model holds the mean of all copies; ``None`` while the model holds the copy.
        self._set_aside: dict[str, Tensor] | None = None
        self._divergence_check = DivergenceCheck()
        self._merges = self._group_merges = self._merge_bytes = self._group_bytes = 0

    @override
    @classmethod
    def check(cls, config: Config, world_size: int) -> None:
        options = cls.options_of(config)
        size = options.group_size
        sizes = [divisor for divisor in range(2, world_size) if world_size % divisor == 0]
        if size is not None and size not in sizes:
            problem = f"does not divide {world_size} ranks into groups"
            raise ConfigError("strategy.group_size", size, problem, ["null", *sizes])
        if config.optimizer.lookahead.every is not None:
            raise ConfigError(
                "optimizer.lookahead.every",
                config.optimizer.lookahead.every,
                "strategy=local_sgd keeps a slow copy by itself, with strategy.outer_optimizer=sgd",
                ["null"],
            )
        if any(group.epochs is not None for group in config.optimizer.groups):
            raise config_error("optimizer.groups", "epochs can't be counted if each rank makes updates of its own")

    @override
    @classmethod
    def check_model(cls, config: Config, model: nn.Module) -> None:
        fragments, parameters = cls.options_of(config).fragments, len(trainable_parameters(model))
        if fragments > parameters:
            problem = f"the model has only {parameters} trainable parameter tensors to divide among them"
            raise ConfigError("strategy.fragments", fragments, problem)

    # --- set-up ------------------------------------------------------------------------------------------------------

    @override
    def setup(self, model: nn.Module, task: Task, make_optimizer: MakeOptimizer, example: Tensor) -> None:
        self.sync_initial_state(model, self.replicas)
        super().setup(model, task, make_optimizer, example)
        options = self.options
        make_outer_optimizer = outer_sgd()
        if options.outer_optimizer != "average":
            nesterov = options.outer_optimizer == "nesterov"
            make_outer_optimizer = outer_sgd(options.outer_lr, options.outer_momentum, nesterov=nesterov)
        self._parameters = trainable_parameters(model)
        self._buffers = NamedBuffers(model, floating=True)
        self._moment_names = _moment_names(make_optimizer)
        self._fragments = [
            Fragment(tensors, self._merge_group, self.compressor, self.stopwatch, make_outer_optimizer)
            for tensors in split_by_bytes(self._parameters, options.fragments)
        ]
        #: For each fragment, the step of every period at whose end its merge starts. Buffers are merged last.
        self._merge_steps = [(index + 1) * options.period // options.fragments for index in range(options.fragments)]
        if self._buffers:
            fragment = Fragment(self._buffers, self._merge_group, self._no_compression, self.stopwatch, outer_sgd())
            self._fragments.append(fragment)
            self._merge_steps.append(options.period)

    @override
    def held_tensors(self) -> dict[str, list[Tensor]]:
        held = super().held_tensors()
        held["buckets"] += [anchor for fragment in self._fragments for anchor in fragment.anchors]
        return held

    @override
    def _bytes_of_passes(self) -> int:
        # The anchors and the differences that are merged, which are made later.
        return 2 * sum(parameter.nbytes for parameter in self.model.parameters())

    @override
    def set_trained(self, names: frozenset[str]) -> None:
        self._restore_local_copy()
        for fragment in self._fragments:
            # Before the compressor's state changes, which a merge under way still needs.
            fragment.wait()
        super().set_trained(names)
        for fragment in self._fragments[: self.options.fragments]:
            fragment.merge_only(names)

    @property
    def _copies(self) -> dict[str, Tensor]:
        """This rank's copy: all tensors that differ between ranks and are merged, by name."""
        return {**self._parameters, **self._buffers}

    @override
    def consensus(self) -> Consensus:
        if self.runtime.world.size == 1:
            return SingleRankConsensus()
        # With overlap, ranks may be up to overlap_steps apart even when a merge is done.
        return AllReduceConsensus(
            self.runtime.control_group(), lambda: self.synchronised, wait_if_infrequent=not self.options.overlap_steps
        )

    @property
    @override
    def skips_locally(self) -> bool:
        return True

    @property
    @override
    def synchronised(self) -> bool:
        step = self._step - self.options.warmup_steps
        return step <= 0 or (step - self._merge_steps[0]) % self.options.period == 0

    @override
    def _make_gradients(self) -> Gradients:
        # Gradients are sent during the warm-up only, without compression: residuals are of differences, not gradients.
        return Gradients(self.model.named_parameters(), self.replicas, self._no_compression, self.stopwatch)

    # --- the step ----------------------------------------------------------------------------------------------------

    @override
    def train_step(self, batch: Batch) -> StepResult:
        self._restore_local_copy()
        with self.stopwatch.step():
            with self.stopwatch.communication():
                self._divergence_check.check()
            warming_up = self._step < self.options.warmup_steps
            count = batch.global_count if warming_up else len(batch)
            result = self._accumulate(batch, count, sends=warming_up)
            if warming_up:
                self.gradients.finish()
            if count:
                result.skipped = self._update()
            self._step += 1
            self._count_samples(batch)
            if not warming_up:
                self._merge(self._step - self.options.warmup_steps)
            elif self._step == self.options.warmup_steps:
                self._end_warmup()
        return result

    def _count_samples(self, batch: Batch) -> None:
        start, _ = shard_bounds(batch.global_count, self._first_of_group, self.replicas.size)
        _, end = shard_bounds(batch.global_count, self._first_of_group + self._group.size - 1, self.replicas.size)
        for fragment in self._fragments:
            fragment.count_step(SampleCount(len(batch), batch.global_count), SampleCount(len(batch), end - start))

    def _end_warmup(self) -> None:
        """Averages the buffers (BatchNorm's statistics); the parameters are equal. From here on copies differ."""
        self._write_copies(self._mean_of_copies())
        for fragment in self._fragments:
            fragment.reset_anchor()
            fragment.reset_counts()
        self._check_anchors(self._fragments)

    # --- merging -----------------------------------------------------------------------------------------------------

    def _merge(self, step: int) -> None:
        """Starts and applies the merges that are due at the end of a step.

        Args:
            step: Steps since the end of the warm-up.
        """
        bytes_before = self.ledger.total()
        # Before other merges start, since a compressor decompresses what belongs to its current step only.
        self._apply_merges(step)
        starting = [
            fragment
            for fragment, merge_step in zip(self._fragments, self._merge_steps, strict=True)
            if (step - merge_step) % self.options.period == 0 and fragment.names
        ]
        if starting:
            self.compressor.begin_step()
            self._merges += 1
        for fragment in starting:
            if self.options.average_optimizer_state:
                self._average_moments(fragment, self.replicas, fragment.samples.weight(self.replicas.size))
            fragment.start_merge(apply_at=step + self.options.overlap_steps)
        if self._group.size > 1 and step % self.options.sync_every == 0:
            bytes_before_group = self.ledger.total()
            self._merge_in_group([fragment for fragment in self._fragments if fragment not in starting])
            self._group_bytes += self.ledger.total() - bytes_before_group
        self._apply_merges(step)
        self._merge_bytes += self.ledger.total() - bytes_before

    def _apply_merges(self, step: int) -> None:
        due = [fragment for fragment in self._fragments if fragment.apply_at == step]
        for fragment in due:
            fragment.finish_merge(keep=self.options.mixing if self.options.overlap_steps else 0.0)
        self._check_anchors(due)

    def _merge_in_group(self, fragments: Sequence[Fragment]) -> None:
        """Averages the copies of this rank's group, uncompressed, since links within a group are fast."""
        self._group_merges += bool(fragments)
        for fragment in fragments:
            weight = fragment.group_samples.weight(self._group.size)
            fragment.group_samples = SampleCount()
            with self.stopwatch.communication():
                self._write_copies(fragment.mean_of_copies(self._group, weight))
            if self.options.average_optimizer_state:
                self._average_moments(fragment, self._group, weight)
        if fragments:
            copies = self._copies
            merged = [copies[name] for fragment in fragments for name in fragment.names]
            self._divergence_check.start(merged, self._group, self._first_of_group, self._step)

    def _check_anchors(self, fragments: Sequence[Fragment]) -> None:
        """Starts to compare the fragments' anchors among all ranks."""
        anchors = [anchor for fragment in fragments for anchor in fragment.anchors]
        if anchors:
            self._divergence_check.start(anchors, self.replicas, 0, self._step)

    @torch.no_grad()
    def _write_copies(self, values: Mapping[str, Tensor]) -> None:
        copies = self._copies
        for name, value in values.items():
            copies[name].copy_(value)

    def _mean_moments(self, names: Iterable[str], communicator: Communicator, weight: float) -> dict[str, Tensor]:
        """The weighted mean over a group of its optimizers' moments, as ``<parameter name>/<moment name>``."""
        moments: dict[str, Tensor] = {}
        for name in names:
            parameter = self._parameters[name]
            for moment_name in self._moment_names:
                # A rank that never had a sample has no moments, and weight 0.
                value = self.optimizer.state[parameter].get(moment_name)
                moments[f"{name}/{moment_name}"] = torch.zeros_like(parameter) if value is None else value
        return weighted_mean(moments, weight, communicator)

    @torch.no_grad()
    def _average_moments(self, fragment: Fragment, communicator: Communicator, weight: float) -> None:
        names = [name for name in fragment.names if name in self._parameters]
        with self.stopwatch.communication():
            means = self._mean_moments(names, communicator, weight)
        for key, mean in means.items():
            name, _, moment_name = key.rpartition("/")
            state = self.optimizer.state[self._parameters[name]]
            if moment_name in state:
                state[moment_name].copy_(mean)

    # --- the merged model --------------------------------------------------------------------------------------------

    def _mean_of_copies(self) -> dict[str, Tensor]:
        """The mean of all tensors that differ between ranks, in new memory; all ranks call it together."""
        if self._step <= self.options.warmup_steps:
            # During the warm-up parameters are equal, since all ranks take the same steps.
            for fragment in self._fragments[: self.options.fragments]:
                if not fragment.copies_equal:
                    fragment.reset_anchor()
        means: dict[str, Tensor] = {}
        for fragment in self._fragments:
            if not fragment.copies_equal:
                means |= fragment.mean_of_copies(self.replicas, fragment.samples.weight(self.replicas.size))
        return means

    @override
    def _prepare_model_state(self) -> None:
        """Puts the mean of all copies into the model until the next training step; all ranks call it together."""
        if self._set_aside is None:
            self._divergence_check.check()
            means = self._mean_of_copies()
            self._set_aside = {name: copy.detach().clone() for name, copy in self._copies.items()}
            self._write_copies(means)

    def _restore_local_copy(self) -> None:
        """Puts this rank's own copy back into the model."""
        if self._set_aside is not None:
            self._write_copies(self._set_aside)
            self._set_aside = None

    @override
    @torch.no_grad()
    def agree_on_average(self, average: Mapping[str, Tensor]) -> None:
        super().agree_on_average(average)
        copies = {name: average[name] for name in self._copies if name in average}
        for name, mean in weighted_mean(copies, 1 / self.replicas.size, self.replicas).items():
            average[name].copy_(mean)

    @override
    def eval_step(self, batch: Batch) -> StepResult:
        self._prepare_model_state()
        return super().eval_step(batch)

    # --- metrics and report ------------------------------------------------------------------------------------------

    @override
    def gradient_norm(self) -> Tensor:
        """Root mean square over the ranks of the norms of their last gradients; all ranks call it together."""
        squares = super().gradient_norm().square()
        return (self.replicas.all_reduce(squares) / self.replicas.size).sqrt()

    @override
    def uncompressed_bytes_per_step(self) -> int:
        """Mean over the steps of a period, without the hashes of the divergence check."""
        options, total = self.options, 0
        for fragment, merge_step in zip(self._fragments, self._merge_steps, strict=True):
            merges_in_group = options.global_every - (merge_step % options.sync_every == 0)
            total += ring_all_reduce_bytes(fragment.bytes, self.replicas.size)
            total += merges_in_group * ring_all_reduce_bytes(fragment.bytes, self._group.size)
        if options.average_optimizer_state:
            total *= 1 + len(self._moment_names)
        return round(total / options.period)

    @override
    def metrics(self) -> dict[str, float]:
        """Adds ``local_sgd/drift``: how far the copies were from their mean at the last merge of each fragment.

        It is the root mean square of the distance over the ranks, divided by the norm of the parameters.
        """
        drift = self._drift()
        return {**super().metrics(), **({} if drift is None else {"local_sgd/drift": drift})}

    def _drift(self) -> float | None:
        squares = [torch.stack(fragment.drift) for fragment in self._fragments if fragment.drift is not None]
        if not squares:
            return None
        distance, norm = self.replicas.all_reduce(torch.stack(squares).sum(0)).tolist()
        return math.sqrt(distance / norm) if norm else 0.0

    @override
    def report(self) -> dict[str, Any]:
        sent = torch.tensor([self._merge_bytes - self._group_bytes, self._group_bytes], device=self.runtime.device)
        global_bytes, group_bytes = self.replicas.all_reduce(sent).tolist()
        report: dict[str, Any] = {"merges": self._merges, "bytes_per_merge": round(global_bytes / max(self._merges, 1))}
        if self._group_merges:
            report["group_merges"] = self._group_merges
            report["bytes_per_group_merge"] = round(group_bytes / self._group_merges)
        report["drift"] = self._drift()
        return {"local_sgd": report, **super().report()}

    # --- state -------------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """The merged model and the mean of the optimizers' moments, besides each rank's own copy and optimizer."""
        for fragment in self._fragments:
            # Before the compressor's state is read, which a merge under way may still change.
            fragment.wait()
        self._prepare_model_state()
        tensors, scalars = named_state.optimizer_state(self.optimizer, self._names)
        assert self._set_aside is not None
        buffers = dict(self.model.named_buffers())
        unmerged = {
            name: tensor
            for name, tensor in module_state.read(self.model).tensors.items()
            if name in buffers and name not in self._set_aside
        }
        local = {f"copy/{name}": tensor for name, tensor in {**self._set_aside, **unmerged}.items()}
        local |= {f"optimizer/{name}": tensor for name, tensor in tensors.items()}
        local |= {f"precision/{name}": torch.tensor(value) for name, value in self.precision.state_dict().items()}
        for index, fragment in enumerate(self._fragments):
            samples, group_samples = fragment.samples, fragment.group_samples
            counts = [samples.local, samples.total, group_samples.local, group_samples.total]
            local[f"seen/{index}"] = torch.tensor(counts)
            if self.runtime.is_main:
                local |= fragment.shared_state()
        trained = trainable_parameters(self.model)
        means = self._mean_moments(trained, self.replicas, 1 / self.replicas.size)
        saved = self._saved({name: means.get(name, tensor) for name, tensor in tensors.items()}, scalars)
        saved["scalars"]["local_sgd"] = {"step": self._step, "warmup_steps": self.options.warmup_steps}
        saved["scalars"]["copies"] = 1 if self._step <= self.options.warmup_steps else self.replicas.size
        return {**saved, "local": {**saved["local"], **local}}

    @override
    @torch.no_grad()
    def load_state_dict(self, saved: Mapping[str, Any]) -> list[RestoredPart]:
        self._set_aside = None
        for fragment in self._fragments:
            # A run that rewinds may have merges under way, and their collectives must be completed.
            fragment.wait()
        progress = saved["scalars"].get("local_sgd")
        # During a warm-up copies are taken as equal; those of a run that was past its warm-up are not.
        same_layout = self.is_arranged_as(saved["layout"]) and progress["warmup_steps"] == self.options.warmup_steps
        local = saved["local"][self.replicas.rank] if same_layout else {}
        if same_layout:
            own_optimizer = _with_prefix("optimizer", local)
            saved = {**saved, "optimizer": own_optimizer, "scalars": {**saved["scalars"], "copies": 1}}
        restored = super().load_state_dict(saved)
        self._step = int(progress["step"]) if progress else 0
        self._load_fragments(saved["local"][0] if progress else {}, local if same_layout else None)
        if not same_layout:
            return restored
        tensors = {**dict(self.model.named_buffers()), **self._parameters}
        for name, tensor in _with_prefix("copy", local).items():
            tensors[name].copy_(tensor)
        precision = {name: value.item() for name, value in _with_prefix("precision", local).items()}
        why = "each rank's copy, its anchor and samples since the last merge"
        own_state = RestoredPart(named_state.LOCAL_STATE, "exact", why)
        replacements = {part.part: part for part in (own_state, self.precision.load_state_dict(precision))}
        return [replacements.get(part.part, part) for part in restored]

    def _load_fragments(self, shared: Mapping[str, Tensor], local: Mapping[str, Tensor] | None) -> None:
        """Loads anchors, merges under way and counts of samples.

        Args:
            shared: Saved tensors that are equal on all ranks.
            local: This rank's saved tensors; ``None`` if they don't fit this run.
        """
        step = self._step - self.options.warmup_steps
        for index, (fragment, merge_step) in enumerate(zip(self._fragments, self._merge_steps, strict=True)):
            last_start = step - (step - merge_step) % self.options.period
            apply_at = last_start + self.options.overlap_steps
            fragment.load_shared_state(shared, apply_at if last_start > 0 and apply_at > step else None)
            if local is not None:
                counts = local.get(f"seen/{index}", torch.zeros(4).long()).tolist()
                fragment.count_step(SampleCount(*counts[:2]), SampleCount(*counts[2:]))


def _moment_names(make_optimizer: MakeOptimizer) -> list[str]:
    """Names of the optimizer's state tensors that have their parameter's shape, from a step on a dummy parameter."""
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.zeros(2)
    optimizer = make_optimizer([("probe", parameter)])
    optimizer.step()
    state = optimizer.state[parameter]
    return sorted(name for name, value in state.items() if isinstance(value, Tensor) and value.shape == parameter.shape)


def _with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix/``, by the rest of their names."""
    return {
        name.removeprefix(f"{prefix}/"): tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}/")
    }
