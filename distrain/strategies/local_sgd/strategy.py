"""strategy=local_sgd: when ranks merge, and what they do in between."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distrain.checkpoint import named_state
from distrain.checkpoint.restore_report import RestoredPart
from distrain.communication.collectives import Communicator, ring_all_reduce_bytes
from distrain.compression.none import NoCompression
from distrain.config.registry import register
from distrain.config.schema import CompressionConfig, Config, StrategyConfig, setting
from distrain.data.sampler import shard_bounds
from distrain.errors import ConfigError, config_error
from distrain.gradients.buckets import Gradients
from distrain.gradients.linear_partition import linear_partition
from distrain.gradients.trainable_parameters import trainable_parameters
from distrain.runtime.consensus import AllReduceConsensus, Consensus, SingleRankConsensus
from distrain.strategies.base import MakeOptimizer, StepResult
from distrain.strategies.local_sgd.divergence_check import Agreement
from distrain.strategies.local_sgd.fragment import Fragment, Outer, Seen, weighted_mean
from distrain.strategies.replicated import Replicated
from distrain.tasks.base import Task

if TYPE_CHECKING:
    from distrain.data.batch import Batch
    from distrain.runtime.runtime import Runtime


@dataclass
class LocalSGDConfig(StrategyConfig):
    """Keys of ``strategy=local_sgd``."""

    sync_every: int = setting("Steps that a rank takes by itself between merges.", at_least=1)
    outer_optimizer: str = setting(
        "What is done with the merged difference: average takes it as it is, sgd and nesterov step along it.",
        choices=("average", "sgd", "nesterov"),
    )
    outer_lr: float = setting("Learning rate of the outer optimizer sgd or nesterov.", above=0)
    outer_momentum: float = setting("Momentum of the outer optimizer sgd or nesterov.", at_least=0, below=1)
    average_optimizer_state: bool = setting("Average the optimizer's moments too, uncompressed.")
    warmup_steps: int = setting("So many first steps are synchronous, as ddp's.", at_least=0)
    group_size: int | None = setting(
        "Ranks of groups of this size merge every sync_every steps; null: there are no groups.", at_least=2
    )
    global_every: int = setting("With groups, all ranks merge every so many sync_every steps.", at_least=1)
    fragments: int = setting("Parts of the model that are merged in turn.", at_least=1)
    overlap_steps: int = setting("Steps taken while a merge travels; 0 waits for it.", at_least=0)
    mixing: float = setting(
        "Share of its own parameters that a rank keeps when a merge comes overlap_steps late.", at_least=0, below=1
    )

    @property
    def period(self) -> int:
        """Steps between a fragment's merges among all ranks."""
        return self.sync_every * self.global_every

    def __post_init__(self) -> None:
        """Refuses values that don't go together.

        Raises:
            ConfigError: See the messages.
        """
        if self.outer_optimizer == "nesterov" and not self.outer_momentum:
            raise ConfigError("strategy.outer_momentum", self.outer_momentum, "outer_optimizer=nesterov needs some")
        if (self.group_size is None) != (self.global_every == 1):
            problem = "needs strategy.group_size" if self.group_size is None else "with groups it must be above 1"
            raise ConfigError("strategy.global_every", self.global_every, problem)
        if self.fragments > self.period:
            raise ConfigError("strategy.fragments", self.fragments, f"there are {self.period} steps for their merges")
        apart = self.period // self.fragments
        if self.overlap_steps > apart:
            problem = f"a merge must be over when the next one begins, {apart} steps later"
            raise ConfigError("strategy.overlap_steps", self.overlap_steps, problem)
        if self.overlap_steps and self.average_optimizer_state:
            raise ConfigError(
                "strategy.average_optimizer_state", True, "is for strategy.overlap_steps=0: moments can't come late"
            )


@register("strategy", "local_sgd", LocalSGDConfig)
class LocalSGD(Replicated[LocalSGDConfig]):
    """Every rank trains its own copy on its shard; every ``sync_every`` steps the copies are merged.

    Local SGD is of Stich 2019 (arXiv 1805.09767); first steps in common and hierarchical groups of Lin et al. 2020,
    post-local SGD (arXiv 1808.07217); merged differences as gradients of an outer optimizer of Douillard et al. 2023,
    DiLoCo (arXiv 2311.08105); fragments in turn, late merges and their mixing of Douillard et al. 2025, Streaming
    DiLoCo (arXiv 2501.18512, algorithm 2).

    A rank's step follows the mean gradient of *its* samples, so its length doesn't depend on the number of ranks. A
    rank without samples does nothing. In a merge each copy weighs by the samples it has seen since the last one: after
    one step of plain SGD from the same parameters, sum of (n_r / n) (x - rate g_r) is x - rate (sum of (n_r / n) g_r),
    ddp's step, however uneven the shares. The norm that ``trainer.grad_clip_norm`` looks at, fp16's loss scale and
    BatchNorm's statistics are each rank's own; the last are merged as parameters are, always by averaging.

    Evaluation, and ``model`` in a checkpoint, see the mean of all copies, weighted as a merge now would weigh them.
    Meanwhile each rank's own copy waits aside, so that looking changes nothing. A checkpoint has besides, in each
    rank's file, its own copy and optimizer, so that the same layout goes on bit for bit. In another layout all copies
    start from the mean; the weighted drift from it adds up to zero by construction, so only the spread is lost.

    With ``trainer.on_nonfinite=skip`` a rank whose gradient is not finite leaves its own step out. With ``rewind`` it
    does that too, and at one of the next merges all ranks go back together. Stops are agreed at merges as well, where
    ranks wait for each other anyway.
    """

    compressed_quantity = "differences"

    def __init__(self, config: Config, runtime: Runtime) -> None:
        super().__init__(config, runtime)
        options = self.options
        runtime.activity.independent_steps = True
        ranks = runtime.world.size
        everyone = runtime.mesh({"data": ranks})
        self.replicas = Communicator(everyone.get_group("data") if everyone else None, self.ledger)
        self.data_shard = (self.replicas.rank, self.replicas.size)
        self.mesh, self._group, self._merging = everyone, Communicator(ledger=self.ledger), self.replicas
        if everyone and options.group_size is not None:
            self.mesh = runtime.mesh({"groups": ranks // options.group_size, "members": options.group_size})
            assert self.mesh is not None
            self._group = Communicator(self.mesh.get_group("members"), self.ledger)
        if everyone and options.overlap_steps:
            # What travels while training goes on must not hold up the small messages of logging.
            self._merging = Communicator(runtime.duplicate_group(everyone, "data"), self.ledger)
        self._first_of_group = self.replicas.rank // self._group.size * self._group.size
        self._plain = NoCompression(CompressionConfig("none"))
        self._step = 0
        self._own: dict[str, Tensor] | None = None
        self._agreement = Agreement()
        self._merges = self._group_merges = self._merge_bytes = self._group_bytes = 0

    @classmethod
    def check(cls, config: Config, world_size: int) -> None:
        """Refuses groups that don't divide the ranks."""
        options = cls.options_of(config)
        size = options.group_size
        sizes = [each for each in range(2, world_size) if world_size % each == 0]
        if size is not None and size not in sizes:
            raise ConfigError(
                "strategy.group_size", size, f"does not cut {world_size} ranks into groups", ["null", *sizes]
            )
        if config.optimizer.lookahead.every is not None:
            raise ConfigError(
                "optimizer.lookahead.every",
                config.optimizer.lookahead.every,
                "strategy=local_sgd keeps a slow copy by itself, with strategy.outer_optimizer=sgd",
                ["null"],
            )
        if any(group.epochs is not None for group in config.optimizer.groups):
            raise config_error("optimizer.groups", "epochs can't be counted where each rank makes updates of its own")

    @classmethod
    def check_model(cls, config: Config, model: nn.Module) -> None:
        """Refuses more fragments than parameters."""
        options = cls.options_of(config)
        most = len(trainable_parameters(model))
        if options.fragments > most:
            raise ConfigError(
                "strategy.fragments", options.fragments, f"the model has only {most} parameters to cut between"
            )

    # --- set-up ------------------------------------------------------------------------------------------------------

    def setup(self, model: nn.Module, task: Task, make_optimizer: MakeOptimizer, example: Tensor) -> None:
        """Makes sure that all ranks start from the same model and cuts it into fragments; see the base class."""
        self.sync_initial_state(model, self.replicas)
        super().setup(model, task, make_optimizer, example)
        options = self.options
        outer = Outer()
        if options.outer_optimizer != "average":
            outer = Outer(options.outer_lr, options.outer_momentum, options.outer_optimizer == "nesterov")
        self._parameters = trainable_parameters(model)
        buffers = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
        #: All that differs between ranks and is merged, by name.
        self._copies: dict[str, Tensor] = {**self._parameters, **buffers}
        self._moments = _moments(make_optimizer)
        self._fragments = [
            Fragment(part, self._merging, self.compressor, self.stopwatch, outer)
            for part in _cut(self._parameters, options.fragments)
        ]
        #: The step of each period after which a fragment leaves; buffers leave with the last one.
        self._leaves = [(index + 1) * options.period // options.fragments for index in range(options.fragments)]
        if buffers:
            self._fragments.append(Fragment(buffers, self._merging, self._plain, self.stopwatch, Outer()))
            self._leaves.append(options.period)

    def consensus(self) -> Consensus:
        """Agrees at merges among all ranks; see the base class."""
        if self.runtime.world.size == 1:
            return SingleRankConsensus()
        # With overlap ranks are up to that many steps apart even when a merge is done.
        return AllReduceConsensus(
            self.runtime.control_group(), lambda: self.synchronised, wait_if_infrequent=not self.options.overlap_steps
        )

    @property
    def skips_locally(self) -> bool:
        """Between merges; see the base class."""
        return True

    @property
    def synchronised(self) -> bool:
        """In the warm-up, and when the first fragment left for its merge; see the base class."""
        step = self._step - self.options.warmup_steps
        return step <= 0 or (step - self._leaves[0]) % self.options.period == 0

    def _make_gradients(self) -> Gradients:
        # They travel during the warm-up only, and not compressed: what is kept back would be of another unit.
        return Gradients(self.model.named_parameters(), self.replicas, self._plain, self.stopwatch)

    # --- the step ----------------------------------------------------------------------------------------------------

    def train_step(self, batch: Batch) -> StepResult:
        """One step of this rank's copy on its share, and the merges that are due; see the base class."""
        self._take_own()
        with self.stopwatch.step():
            with self.stopwatch.communication():
                self._agreement.check()
            warming_up = self._step < self.options.warmup_steps
            count = batch.global_count if warming_up else len(batch)
            result = self._accumulate(batch, count, sends=warming_up)
            if warming_up:
                self.gradients.finish()
            if count:
                result.left_out = self._update()
            self._step += 1
            self._count(batch)
            if not warming_up:
                self._merge(self._step - self.options.warmup_steps)
            elif self._step == self.options.warmup_steps:
                self._end_warmup()
        return result

    def _count(self, batch: Batch) -> None:
        start, _ = shard_bounds(batch.global_count, self._first_of_group, self.replicas.size)
        _, end = shard_bounds(batch.global_count, self._first_of_group + self._group.size - 1, self.replicas.size)
        own = len(batch)
        for fragment in self._fragments:
            fragment.count(Seen(own, batch.global_count), Seen(own, end - start))

    def _end_warmup(self) -> None:
        """Parameters are equal, buffers (BatchNorm's statistics) are averaged: from here copies part and merge."""
        self._write(self._averaged())
        for fragment in self._fragments:
            fragment.adopt()
            fragment.reset()
        self._agree(self._fragments)

    # --- merging -----------------------------------------------------------------------------------------------------

    def _merge(self, step: int) -> None:
        """Does what is due at the end of a step, counted from the end of the warm-up."""
        sent = self.ledger.total()
        period = self.options.period
        # Before others leave: what a compressor decodes must be of the step that it is in.
        self._apply_due(step)
        leaving = [
            fragment
            for fragment, leaves in zip(self._fragments, self._leaves, strict=True)
            if (step - leaves) % period == 0
        ]
        if leaving:
            self.compressor.begin_step()
            self._merges += 1
        for fragment in leaving:
            if self.options.average_optimizer_state:
                self._average_moments(fragment, self.replicas, fragment.seen.weight(self.replicas.size))
            fragment.leave(due=step + self.options.overlap_steps)
        if self._group.size > 1 and step % self.options.sync_every == 0:
            before = self.ledger.total()
            self._merge_group([fragment for fragment in self._fragments if fragment not in leaving])
            self._group_bytes += self.ledger.total() - before
        self._apply_due(step)
        self._merge_bytes += self.ledger.total() - sent

    def _apply_due(self, step: int) -> None:
        arrived = [fragment for fragment in self._fragments if fragment.due == step]
        for fragment in arrived:
            fragment.apply(keep=self.options.mixing if self.options.overlap_steps else 0.0)
        self._agree(arrived)

    def _merge_group(self, fragments: Sequence[Fragment]) -> None:
        """Averages the copies of this rank's group, as they are: a group's links are the fast ones."""
        self._group_merges += bool(fragments)
        for fragment in fragments:
            weight = fragment.seen_in_group.weight(self._group.size)
            fragment.seen_in_group = Seen()
            with self.stopwatch.communication():
                self._write(fragment.averaged(self._group, weight))
            if self.options.average_optimizer_state:
                self._average_moments(fragment, self._group, weight)
        if fragments:
            merged = [self._copies[name] for fragment in fragments for name in fragment.names]
            self._agreement.start(merged, self._group, self._first_of_group, self._step)

    def _agree(self, fragments: Sequence[Fragment]) -> None:
        anchors = [anchor for fragment in fragments for anchor in fragment.anchors]
        if anchors:
            self._agreement.start(anchors, self.replicas, 0, self._step)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._copies[name].copy_(value)

    def _mean_moments(self, names: Iterable[str], communicator: Communicator, weight: float) -> dict[str, Tensor]:
        """The weighted mean over a group of what its optimizers keep in the parameters' shapes."""
        kept: dict[str, Tensor] = {}
        for name in names:
            parameter = self._parameters[name]
            for what in self._moments:
                # A rank that never had a sample has none, and no weight.
                value = self.optimizer.state[parameter].get(what)
                kept[f"{name}/{what}"] = torch.zeros_like(parameter) if value is None else value
        return weighted_mean(kept, weight, communicator)

    @torch.no_grad()
    def _average_moments(self, fragment: Fragment, communicator: Communicator, weight: float) -> None:
        names = [name for name in fragment.names if name in self._parameters]
        with self.stopwatch.communication():
            means = self._mean_moments(names, communicator, weight)
        for key, mean in means.items():
            name, _, what = key.rpartition("/")
            kept = self.optimizer.state[self._parameters[name]]
            if what in kept:
                kept[what].copy_(mean)

    # --- the merged model --------------------------------------------------------------------------------------------

    def _averaged(self) -> dict[str, Tensor]:
        """The mean of the copies that differ, by name, in memory of its own; all ranks call it together."""
        self._adopt_equal()
        found: dict[str, Tensor] = {}
        for fragment in self._fragments:
            if not fragment.together:
                found |= fragment.averaged(self.replicas, fragment.seen.weight(self.replicas.size))
        return found

    def _adopt_equal(self) -> None:
        """In the warm-up parameters are equal by equal steps."""
        if self._step <= self.options.warmup_steps:
            for fragment in self._fragments[: self.options.fragments]:
                if not fragment.together:
                    fragment.adopt()

    def _show_merged(self) -> None:
        """Puts the mean of all copies into the model until the next training step; all ranks call it together."""
        if self._own is None:
            self._agreement.check()
            merged = self._averaged()
            self._own = {name: copy.detach().clone() for name, copy in self._copies.items()}
            self._write(merged)

    def _take_own(self) -> None:
        """Puts this rank's own copy back."""
        if self._own is not None:
            self._write(self._own)
            self._own = None

    def eval_step(self, batch: Batch) -> StepResult:
        """Forward only, of the merged model; see the base class."""
        self._show_merged()
        return super().eval_step(batch)

    def model_state(self) -> dict[str, Tensor]:
        """The merged model's parameters and buffers by name; all ranks call it together."""
        self._show_merged()
        return super().model_state()

    # --- what came of it ---------------------------------------------------------------------------------------------

    def gradient_norm(self) -> Tensor:
        """Root mean square over the ranks of their last gradients' norms; all ranks call it together."""
        squares = super().gradient_norm().square()
        return (self.replicas.all_reduce(squares) / self.replicas.size).sqrt()

    def uncompressed_bytes_per_step(self) -> int:
        """Bytes this rank would send without compression, the mean over the steps of a period; without hashes."""
        options, total = self.options, 0
        for fragment, leaves in zip(self._fragments, self._leaves, strict=True):
            in_group = options.global_every - (leaves % options.sync_every == 0)
            total += ring_all_reduce_bytes(fragment.bytes, self.replicas.size)
            total += in_group * ring_all_reduce_bytes(fragment.bytes, self._group.size)
        if options.average_optimizer_state:
            total *= 1 + len(self._moments)
        return round(total / options.period)

    def metrics(self) -> dict[str, float]:
        """The base class's, and ``local_sgd/drift``: how far copies were from their mean when they were last merged.

        It is the root mean square over the ranks, relative to the parameters' norm.
        """
        drift = self._drift()
        return {**super().metrics(), **({} if drift is None else {"local_sgd/drift": drift})}

    def _drift(self) -> float | None:
        squares = [torch.stack(fragment.drift) for fragment in self._fragments if fragment.drift is not None]
        if not squares:
            return None
        apart, whole = self.replicas.all_reduce(torch.stack(squares).sum(0)).tolist()
        return math.sqrt(apart / whole) if whole else 0.0

    def report(self) -> dict[str, Any]:
        """Merges among all ranks and in groups, what all ranks together sent for one, and the last drift."""
        sent = torch.tensor([self._merge_bytes - self._group_bytes, self._group_bytes], device=self.runtime.device)
        sent_by_all, sent_in_groups = self.replicas.all_reduce(sent).tolist()
        found: dict[str, Any] = {"merges": self._merges, "bytes_per_merge": round(sent_by_all / max(self._merges, 1))}
        if self._group_merges:
            found["group_merges"] = self._group_merges
            found["bytes_per_group_merge"] = round(sent_in_groups / self._group_merges)
        found["drift"] = self._drift()
        return {"local_sgd": found, **super().report()}

    # --- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The merged model, optimizers' moments averaged, and what each rank has for itself; see the base class."""
        for fragment in self._fragments:
            # Before the compressor's state is taken, which a merge under way may still change.
            fragment.wait()
        model = self.model_state()
        tensors, scalars = named_state.optimizer_state(self.optimizer, self._names)
        assert self._own is not None
        own = {**self._own, **{name: b for name, b in self.model.named_buffers() if name not in self._copies}}
        local = {f"copy/{name}": tensor for name, tensor in own.items()}
        local |= {f"optimizer/{name}": tensor for name, tensor in tensors.items()}
        local |= {f"precision/{name}": torch.tensor(value) for name, value in self.precision.state_dict().items()}
        for index, fragment in enumerate(self._fragments):
            seen = [fragment.seen.own, fragment.seen.total, fragment.seen_in_group.own, fragment.seen_in_group.total]
            local[f"seen/{index}"] = torch.tensor(seen)
            if self.runtime.is_main:
                local |= fragment.shared_state()
        means = self._mean_moments(self._parameters, self.replicas, 1 / self.replicas.size)
        saved = self._saved(model, {name: means.get(name, tensor) for name, tensor in tensors.items()}, scalars)
        saved["scalars"]["local_sgd"] = {"step": self._step, "warmup_steps": self.options.warmup_steps}
        saved["scalars"]["copies"] = 1 if self._step <= self.options.warmup_steps else self.replicas.size
        return {**saved, "local": local}

    @torch.no_grad()
    def load_state_dict(self, saved: Mapping[str, Any]) -> list[RestoredPart]:
        """Takes back what :meth:`state_dict` gave; see the base class."""
        self._own = None
        for fragment in self._fragments:
            # A run that goes back has merges under way, which nobody may be left to wait for.
            fragment.wait()
        ours = saved["scalars"].get("local_sgd")
        # In a warm-up copies are taken to be equal, so those of a run that was past it don't fit.
        same = saved["layout"] == self.layout and ours["warmup_steps"] == self.options.warmup_steps
        local = saved["local"][self.replicas.rank] if same else {}
        mine = {"optimizer": _below("optimizer", local), "scalars": {**saved["scalars"], "copies": 1}}
        *carried, scale, residuals, factors = super().load_state_dict({**saved, **mine} if same else saved)
        self._step = int(ours["step"]) if ours else 0
        step = self._step - self.options.warmup_steps
        shared = saved["local"][0] if ours else {}
        for index, (fragment, leaves) in enumerate(zip(self._fragments, self._leaves, strict=True)):
            left = step - (step - leaves) % self.options.period
            due = left + self.options.overlap_steps
            fragment.load_shared_state(shared, due if left > 0 and due > step else None)
            if same:
                own, total, own_in_group, total_in_group = local.get(f"seen/{index}", torch.zeros(4).long()).tolist()
                fragment.count(Seen(own, total), Seen(own_in_group, total_in_group))
        if same:
            held = {**dict(self.model.named_buffers()), **self._parameters}
            for name, tensor in _below("copy", local).items():
                held[name].copy_(tensor)
            scale = self.precision.load_state_dict({k: v.item() for k, v in _below("precision", local).items()})
            carried[-1] = RestoredPart(
                named_state.LOCAL_STATE, "exact", "each rank's copy, its anchor and samples since the last merge"
            )
        return [*carried, scale, residuals, factors]


def _cut(parameters: Mapping[str, nn.Parameter], count: int) -> list[dict[str, nn.Parameter]]:
    """A row of parameters in parts whose largest has as few bytes as can be."""
    row = list(parameters.items())
    sizes = [float(parameter.numel() * parameter.element_size()) for _, parameter in row]
    starts = linear_partition(sizes, [0.0] * len(row), count, range(1, len(row)))
    return [dict(row[start:stop]) for start, stop in zip(starts, [*starts[1:], len(row)], strict=True)]


def _moments(make_optimizer: MakeOptimizer) -> list[str]:
    """What an optimizer keeps in its parameters' shapes, found out by a step of one that is thrown away."""
    probe = nn.Parameter(torch.zeros(2))
    probe.grad = torch.zeros(2)
    optimizer = make_optimizer([("probe", probe)])
    optimizer.step()
    kept = optimizer.state[probe]
    return sorted(what for what, value in kept.items() if isinstance(value, Tensor) and value.shape == probe.shape)


def _below(what: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with ``what/``, without it."""
    return {name.removeprefix(f"{what}/"): t for name, t in tensors.items() if name.startswith(f"{what}/")}
