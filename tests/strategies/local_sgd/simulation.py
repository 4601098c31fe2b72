"""What ranks of strategy=local_sgd compute, in one process, and the options with which it is compared."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distrain.data.batch import Batch
from distrain.data.sampler import shard_bounds
from distrain.optim.optimizers.build import build_optimizer
from tests.runs import small
from tests.strategies.helpers import batch, drawn, parameters

#: Ranks' shares differ in size, and on three or four ranks some find no sample in the batches of two.
SIZES = (10, 2, 7, 11, 9, 2, 10, 7, 8, 10, 3, 10)


def network(*, norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    between = nn.BatchNorm2d(6) if norm else nn.Identity()
    model = nn.Sequential(nn.Conv2d(3, 6, 3), between, nn.Tanh(), nn.Flatten(), nn.Linear(6 * 16, 4))
    return model.double().to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


#: Cut in two by bytes.
HALVES = (("0.weight", "0.bias"), ("4.weight", "4.bias"))


def batches(sizes: tuple[int, ...] = SIZES) -> list[Batch]:
    return [drawn(size, 3, 6, 6, seed=step, dtype=torch.float64) for step, size in enumerate(sizes)]


# --- the simulation --------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """Options of a run."""

    sync_every: int = 4
    optimizer: tuple[str, ...] = ("optimizer=sgd",)
    outer: tuple[str, float, float] = ("average", 1.0, 0.0)
    warmup: int = 0
    group: int | None = None
    global_every: int = 1
    fragments: tuple[tuple[str, ...], ...] = (HALVES[0] + HALVES[1],)
    overlap: int = 0
    mixing: float = 0.5
    clip: float | None = None
    moments: bool = False
    micro_batch: int | None = None

    def overrides(self) -> tuple[str, ...]:
        name, rate, momentum = self.outer
        return (
            "strategy=local_sgd",
            "trainer.precision=fp64",
            f"strategy.sync_every={self.sync_every}",
            *self.optimizer,
            f"strategy.outer_optimizer={name}",
            f"strategy.outer_lr={rate}",
            f"strategy.outer_momentum={momentum}",
            f"strategy.warmup_steps={self.warmup}",
            f"strategy.group_size={self.group or 'null'}",
            f"strategy.global_every={self.global_every}",
            f"strategy.fragments={len(self.fragments)}",
            f"strategy.overlap_steps={self.overlap}",
            f"strategy.mixing={self.mixing}",
            f"trainer.grad_clip_norm={self.clip or 'null'}",
            f"trainer.micro_batch_size={self.micro_batch or 'null'}",
            f"strategy.average_optimizer_state={str(self.moments).lower()}",
        )


ADAM = ("optimizer=adam", "optimizer.lr=0.01", "optimizer.eps=1e-3")
MOMENTUM = ("optimizer=sgd", "optimizer.lr=0.05", "optimizer.momentum=0.9", "optimizer.weight_decay=0.01")
DILOCO = ("nesterov", 0.7, 0.9)
CASES = {
    "average": Case(optimizer=MOMENTUM),
    "DiLoCo": Case(optimizer=ADAM, outer=DILOCO),
    "outer SGD": Case(sync_every=3, optimizer=ADAM, outer=("sgd", 0.5, 0.8)),
    "warm-up": Case(sync_every=3, optimizer=ADAM, warmup=2, clip=0.5),
    "clipped, accumulated": Case(optimizer=MOMENTUM, clip=0.2, micro_batch=2),
    "moments": Case(sync_every=2, optimizer=ADAM, moments=True),
    "fragments": Case(optimizer=ADAM, outer=DILOCO, fragments=HALVES),
    "late": Case(optimizer=ADAM, outer=DILOCO, overlap=2),
    "late by all": Case(sync_every=3, optimizer=ADAM, outer=DILOCO, overlap=3),
    "late fragments": Case(optimizer=ADAM, outer=DILOCO, fragments=HALVES, overlap=2, mixing=0.3, warmup=1),
    "groups": Case(sync_every=2, optimizer=ADAM, group=2, global_every=2),
    "groups, moments": Case(sync_every=2, optimizer=ADAM, group=2, global_every=2, moments=True),
    "groups, DiLoCo, late fragments": Case(
        sync_every=1, optimizer=ADAM, group=2, global_every=4, outer=DILOCO, fragments=HALVES, overlap=1
    ),
}


class Simulation:
    """All ranks in one process, written directly from the papers."""

    def __init__(self, case: Case, ranks: int) -> None:
        self.case, self.ranks = case, ranks
        self.models = [network() for _ in range(ranks)]
        config = small(*case.overrides()).optimizer
        self.optimizers = [build_optimizer(config, model.parameters()) for model in self.models]
        name, rate, momentum = case.outer
        self.global_parameters = {n: p.detach().clone() for n, p in self.models[0].named_parameters()}
        self.outer = torch.optim.SGD(
            self.global_parameters.values(),
            lr=1.0 if name == "average" else rate,
            momentum=0.0 if name == "average" else momentum,
            nesterov=name == "nesterov",
        )
        self.merges_under_way: list[tuple[int, tuple[str, ...], dict[str, Tensor]]] = []
        self.samples = {fragment: [0] * ranks for fragment in case.fragments}
        self.group_samples = {fragment: [0] * ranks for fragment in case.fragments}
        self.steps = 0
        self.drift: float | None = None

    def step(self, whole: Batch) -> None:
        case, self.steps = self.case, self.steps + 1
        together = self.steps <= case.warmup
        for rank, (model, optimizer) in enumerate(zip(self.models, self.optimizers, strict=True)):
            share = whole if together else batch(whole.inputs, whole.targets, (rank, self.ranks))
            if len(share.targets):
                optimizer.zero_grad()
                F.cross_entropy(model(share.inputs), share.targets).backward()
                if case.clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), case.clip)
                optimizer.step()
        if together:
            self.global_parameters = {n: p.detach().clone() for n, p in self.models[0].named_parameters()}
            self.outer.param_groups[0]["params"] = list(self.global_parameters.values())
            return
        for counts in (*self.samples.values(), *self.group_samples.values()):
            for rank in range(self.ranks):
                start, end = shard_bounds(len(whole.targets), rank, self.ranks)
                counts[rank] += end - start
        self.merge(self.steps - case.warmup)

    def merge(self, step: int) -> None:
        case = self.case
        period = case.sync_every * case.global_every
        self.apply(step)
        leaving = [
            fragment
            for index, fragment in enumerate(case.fragments)
            if step % period == (index + 1) * period // len(case.fragments) % period
        ]
        for fragment in leaving:
            mean = self.average(fragment, range(self.ranks), self.samples[fragment])
            self.drift = self.distance(mean)
            gradients = {name: self.global_parameters[name] - mean[name] for name in fragment}
            self.merges_under_way.append((step + case.overlap, fragment, gradients))
            if case.moments:
                self.average_moments(fragment, range(self.ranks), self.samples[fragment])
            self.samples[fragment] = [0] * self.ranks
            self.group_samples[fragment] = [0] * self.ranks
        if case.group is not None and step % case.sync_every == 0:
            for fragment in (each for each in case.fragments if each not in leaving):
                for first in range(0, self.ranks, case.group):
                    members = range(first, first + case.group)
                    counts = self.group_samples[fragment]
                    mean = self.average(fragment, members, counts)
                    for rank in members:
                        for name in fragment:
                            self.models[rank].get_parameter(name).data.copy_(mean[name])
                    if case.moments:
                        self.average_moments(fragment, members, counts)
                self.group_samples[fragment] = [0] * self.ranks
        self.apply(step)

    def apply(self, step: int) -> None:
        case = self.case
        for _, fragment, gradients in [each for each in self.merges_under_way if each[0] == step]:
            for name, parameter in self.global_parameters.items():
                parameter.grad = gradients.get(name)
            self.outer.step()
            keep = case.mixing if case.overlap else 0.0
            for model in self.models:
                for name in fragment:
                    own = model.get_parameter(name).data
                    own.copy_(keep * own + (1 - keep) * self.global_parameters[name])
        self.merges_under_way = [each for each in self.merges_under_way if each[0] > step]

    @torch.no_grad()
    def distance(self, mean: dict[str, Tensor]) -> float:
        """Root mean square over the ranks of their copies' distance from the mean, relative to the last merge's."""
        squares = sum((m.get_parameter(n) - each).square().sum() for n, each in mean.items() for m in self.models)
        whole = sum(self.global_parameters[name].square().sum() for name in mean)
        return float((squares / self.ranks / whole) ** 0.5)

    def average(self, names: tuple[str, ...], members: range, counts: list[int]) -> dict[str, Tensor]:
        held = [dict(self.models[rank].named_parameters()) for rank in members]
        whole = sum(counts[rank] for rank in members)
        weights = [counts[rank] / whole if whole else 1 / len(members) for rank in members]
        return {
            name: sum((w * h[name].detach() for w, h in zip(weights, held, strict=True)), torch.tensor(0.0))
            for name in names
        }

    def average_moments(self, names: tuple[str, ...], members: range, counts: list[int]) -> None:
        for name in names:
            for what in ("exp_avg", "exp_avg_sq"):
                kept = [self.optimizers[rank].state[self.models[rank].get_parameter(name)][what] for rank in members]
                whole = sum(counts[each] for each in members)
                mean = sum((counts[r] / whole * k for r, k in zip(members, kept, strict=True)), torch.tensor(0.0))
                for each in kept:
                    each.copy_(mean)

    def merged(self) -> Tensor:
        """The mean of all copies, weighted by the samples seen since each fragment's last merge."""
        model = copy.deepcopy(self.models[0])
        for fragment in self.case.fragments:
            for name, mean in self.average(fragment, range(self.ranks), self.samples[fragment]).items():
                model.get_parameter(name).data.copy_(mean)
        return parameters(model)
