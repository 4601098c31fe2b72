"""Compares what runs recorded with the serial run, within limits that the serial run's own reorderings give.

Floating-point sums depend on their order, and ranks add in another order than one process does. How much that changes
is measured: the serial run is done again with the samples of each forward pass in another order, which changes no
formula, and its distance from the first serial run is the *spread*. A parallel run may be :data:`FACTOR` times as far
away. Where the spread is 0 by chance, the limit is a few rounding errors. In 16-bit formats each rank rounds sums of
its own, which no order shows; there one of the serial runs has its gradients rounded once more, and the factor is
:data:`FACTOR_16_BIT`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distrain.verification.recorder import GRADIENTS, STATE, RankRecord, StepRecord

#: Times the measured spread that is allowed: the kernels for a share of a batch add in other ways than those for all.
FACTOR = 64
#: The same in 16-bit formats, where the spread is that of whole roundings.
FACTOR_16_BIT = 8
HALF = ("bf16", "fp16")
#: Machine epsilon of what is computed with each precision.
EPSILON = {"fp64": 2.0**-52, "fp32": 2.0**-23, "bf16": 2.0**-7, "fp16": 2.0**-10}
#: Rounding errors that are always allowed, relative to the norm of all tensors. In 16-bit formats a rounding error may
#: tip a ReLU or a maximum over, which moves a gradient by some percent; float64 tells whether formulas are equal.
_ALWAYS = {"fp64": 64.0, "fp32": 64.0, "bf16": 8.0, "fp16": 32.0}
#: In the first step nothing has grown yet: what reordering changes by more than this is no rounding.
_FIRST_STEP_CAP = {precision: math.sqrt(epsilon) for precision, epsilon in EPSILON.items()}
#: Limits above this say nothing any more.
BLIND = 0.05
#: A sample whose decision is a tie may be counted either way.
_TIES = 2

EXACT = ("sample order", "sample content", "sample count", "evaluation count")
#: The order in which a step, and what follows it, computes them.
_ORDER_IN_A_STEP = (
    *("sample order", "sample count", "sample content", "loss", "training metrics", "gradients", "parameters"),
    *("buffers", "evaluation count", "evaluation loss", "evaluation metrics"),
)
NUMBERS = ("loss", "training metrics", "gradients", "parameters", "buffers", "evaluation loss", "evaluation metrics")


@dataclass(frozen=True)
class Difference:
    """How far something is from that of the serial run.

    Attributes:
        value: Relative to the norm of all tensors of the kind, or to the number itself; 1 where unequal things can't be
            subtracted.
        where: Tensor, metric or sample with the largest difference.
        step: Where it was found.
    """

    value: float
    where: str
    step: int


#: By quantity, then by step.
Series = dict[str, dict[int, Difference]]


def series(reference: RankRecord, ranks: Sequence[RankRecord]) -> Series:
    """The differences of a run from the serial run.

    Args:
        reference: The serial run.
        ranks: The compared run, of all its ranks.
    """
    found: Series = {name: {} for name in (*EXACT, *NUMBERS)}
    parameters = set(reference.parameters)
    for step, expected in reference.steps.items():
        records = [rank.steps[step] for rank in ranks if step in rank.steps]
        training = [record for record in records if record.shard[1]]
        if not training:
            continue
        _compare_samples(found, step, expected, training)
        _compare_sums(found, step, expected, training)
        for kind, names in ((GRADIENTS, None), (STATE, parameters)):
            distances = _largest(record.distances.get(kind, {}) for record in records)
            scales = expected.distances.get(kind, {})
            if names is None:
                _compare_tensors(found["gradients"], step, distances, scales)
            else:
                mine = {name: each for name, each in distances.items() if name in names}
                rest = {name: each for name, each in distances.items() if name not in names}
                _compare_tensors(found["parameters"], step, mine, {n: s for n, s in scales.items() if n in names})
                _compare_tensors(found["buffers"], step, rest, {n: s for n, s in scales.items() if n not in names})
    _compare_evaluations(found, reference, ranks[0])
    return found


def _compare_samples(found: Series, step: int, expected: StepRecord, records: Iterable[StepRecord]) -> None:
    shards = {record.shard[0]: record for record in records}
    merged = [shards[index] for index in sorted(shards)]
    indices = [position for record in merged for position in record.indices]
    samples = [sample for record in merged for sample in record.samples]
    targets = [target for record in merged for target in record.targets]
    same = indices == expected.indices
    place = next((i for i, (a, b) in enumerate(zip(indices, expected.indices, strict=False)) if a != b), len(indices))
    found["sample order"][step] = Difference(float(not same), "" if same else f"sample {place} of the batch", step)
    found["sample count"][step] = Difference(float(abs(len(indices) - len(expected.indices))), "", step)
    other = [
        (position, kind)
        for kind, mine, theirs in (("input", samples, expected.samples), ("target", targets, expected.targets))
        for position, a, b in zip(expected.indices, mine, theirs, strict=False)
        if a != b
    ]
    where = f"{other[0][1]} of sample {other[0][0]}" if other and same else ""
    found["sample content"][step] = Difference(float(bool(where)), where, step)


def _compare_sums(found: Series, step: int, expected: StepRecord, records: Sequence[StepRecord]) -> None:
    # Ranks of one pipeline hold a share together, and the last of them has its sums.
    count = sum(record.count for record in records)
    loss = sum(record.loss_sum for record in records) / max(count, 1)
    found["loss"][step] = Difference(_relative(loss, expected.loss_sum / max(expected.count, 1)), "", step)
    sums = [sum(values) for values in zip(*(record.metric_sums for record in records), strict=True)]
    pairs = zip(sums, expected.metric_sums, strict=True)
    worst = max((abs(mine - theirs) / max(expected.count, 1) for mine, theirs in pairs), default=0.0)
    found["training metrics"][step] = Difference(worst, "", step)


def _largest(parts: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The largest distance of each tensor over the ranks that hold it."""
    found: dict[str, float] = {}
    for part in parts:
        for name, (far, _) in part.items():
            found[name] = max(found.get(name, 0.0), far)
    return found


def _compare_tensors(
    found: dict[int, Difference], step: int, distances: Mapping[str, float], scales: Mapping[str, Any]
) -> None:
    if not distances:
        return
    scale = math.sqrt(sum(near * near for _, near in scales.values())) or 1.0
    name = max(distances, key=lambda each: distances[each])
    found[step] = Difference(distances[name] / scale, name, step)


def _compare_evaluations(found: Series, reference: RankRecord, rank: RankRecord) -> None:
    expected = {(entry["step"], entry["split"]): entry for entry in reference.evaluations}
    for entry in rank.evaluations:
        theirs = expected.get((entry["step"], entry["split"]))
        if theirs is None:
            continue
        step, split = entry["step"], entry["split"]
        loss = Difference(_relative(entry["loss"], theirs["loss"]), split, step)
        metrics = max(
            (
                Difference(_relative(value, theirs["metrics"][name], at_least=1.0), f"{split} {name}", step)
                for name, value in entry["metrics"].items()
            ),
            key=lambda each: each.value,
            default=Difference(0.0, split, step),
        )
        counts = Difference(float(abs(entry["count"] - theirs["count"])), split, step)
        for name, difference in (("loss", loss), ("metrics", metrics), ("count", counts)):
            before = found[f"evaluation {name}"].get(step)
            if before is None or difference.value > before.value:
                found[f"evaluation {name}"][step] = difference


def _relative(mine: float, theirs: float, at_least: float = 1e-12) -> float:
    if mine == theirs or (math.isnan(mine) and math.isnan(theirs)):
        return 0.0
    difference = abs(mine - theirs) / max(abs(theirs), at_least)
    return difference if math.isfinite(difference) else math.inf


class Limits:
    """The limit of each quantity at each step.

    Args:
        spreads: The differences of each reordered serial run.
        precision: Of these runs.
        tolerance: Takes the place of what is measured, if given.
        evaluated: Samples of the smallest evaluation.
        batch: Samples of the smallest batch.
    """

    def __init__(
        self, spreads: Sequence[Series], precision: str, tolerance: float | None, evaluated: int, batch: int
    ) -> None:
        self._spreads, self._precision, self._tolerance = spreads, precision, tolerance
        self._ties = {"evaluation metrics": _TIES / max(evaluated, 1), "training metrics": _TIES / max(batch, 1)}

    def spread(self, quantity: str, step: int) -> float:
        """The largest difference of the reordered serial runs up to a step."""
        values = (each.get(quantity, {}) for each in self._spreads)
        return max((found.value for steps in values for at, found in steps.items() if at <= step), default=0.0)

    def limit(self, quantity: str, step: int) -> float:
        """The largest difference at a step that counts as equal."""
        if quantity in EXACT:
            return 0.0
        if self._tolerance is not None:
            return self._tolerance
        limit = (FACTOR_16_BIT if self._precision in HALF else FACTOR) * self.spread(quantity, step)
        if step == 1:
            limit = min(limit, _FIRST_STEP_CAP[self._precision])
        if self._precision != "fp64":
            limit = max(limit, self._ties.get(quantity, 0.0))
        return max(limit, _ALWAYS[self._precision] * EPSILON[self._precision])

    def order_matters(self) -> Difference | None:
        """What the order of the samples in a batch changes in the first step by more than rounding, if anything."""
        for quantity in ("loss", "gradients"):
            for each in self._spreads:
                found = each.get(quantity, {}).get(1)
                if found is not None and found.value > _FIRST_STEP_CAP[self._precision]:
                    return found
        return None


@dataclass(frozen=True)
class Verdict:
    """One row of the certificate.

    Attributes:
        quantity: What was compared.
        largest: Its largest difference, if it was compared.
        limit: At that step.
        spread: Of the reordered serial runs up to that step.
        parted: The first difference above its limit.
        compared: Steps at which it was compared.
        blind_from: The step from which on the limit is too wide to tell anything.
    """

    quantity: str
    largest: Difference | None
    limit: float
    spread: float
    parted: Difference | None
    compared: int
    blind_from: int | None = None

    @property
    def equal(self) -> bool:
        """Whether no difference is above its limit."""
        return self.parted is None


def judge(found: Series, limits: Limits) -> list[Verdict]:
    """The verdict on each quantity that was compared."""
    verdicts = []
    for quantity, steps in found.items():
        # Nearest to its limit, as the largest difference: limits grow with the steps.
        ratio = {step: each.value / (limits.limit(quantity, step) or 1.0) for step, each in steps.items()}
        worst = max(ratio, key=lambda step: ratio[step], default=None)
        parted = next(
            (each for step, each in sorted(steps.items()) if not each.value <= limits.limit(quantity, step)), None
        )
        blind = next((step for step in sorted(steps) if limits.limit(quantity, step) > BLIND), None)
        at = 1 if worst is None else worst
        verdicts.append(
            Verdict(
                quantity,
                None if worst is None else steps[worst],
                limits.limit(quantity, at),
                limits.spread(quantity, at),
                parted,
                len(steps),
                blind if quantity not in ("training metrics", "evaluation metrics") else None,
            )
        )
    return verdicts


def first_parting(verdicts: Iterable[Verdict]) -> tuple[str, Difference] | None:
    """The quantity that differs first, in the order in which a step computes them."""
    parted = [(verdict.quantity, verdict.parted) for verdict in verdicts if verdict.parted is not None]
    return min(parted, key=lambda pair: (pair[1].step, _ORDER_IN_A_STEP.index(pair[0])), default=None)


def bitwise_differences(run: RankRecord, again: RankRecord) -> tuple[int, Difference | None]:
    """Steps that two runs share, and the first tensor whose bits differ after one of them."""
    shared = sorted(step for step, record in again.steps.items() if record.hashes and step in run.steps)
    for step in shared:
        theirs = run.steps[step].hashes
        for name, found in again.steps[step].hashes.items():
            if found != theirs.get(name):
                return len(shared), Difference(1.0, name, step)
    return len(shared), None
