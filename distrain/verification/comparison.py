"""Compares what runs recorded with the serial run, within limits that the serial run's own reorderings give.

Floating-point sums depend on their order, and ranks add in another order than one process does. How much that changes
is measured: the serial run is done again with the samples of each forward pass in another order, which changes no
formula, and its distance from the first serial run is the *spread*. A parallel run may be :data:`FACTOR` times as far
away. Where the spread is 0 by chance, the limit is a few rounding errors.

In 16-bit formats another order alone may change nothing: sums are formed in 32 bits, and rounded once. But ranks round
their own sums. So there the spread also is what rounding itself does to the serial run: its distance from the same run
in float32. A parallel run, which rounds as often, is about as far from that run, and may be :data:`FACTOR_16_BIT` times
the spread from the serial one. ``docs/verify.md`` has the measurements.

What only one of the runs has (a step, a tensor, an evaluation) is a difference without measure, and above every limit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distrain.verification.recorder import GRADIENTS, STATE, RankRecord, StepRecord

#: Times the measured spread that is allowed: the kernels for a share of a batch add in other ways than those for all.
FACTOR = 64
#: The same in 16-bit formats: 1 for the rounding of each of the two runs, twice.
FACTOR_16_BIT = 4
#: The same for a single number, which may be near those of all three runs by chance; for normally distributed numbers
#: that gives a false alarm in 2 of 10,000 comparisons (4 would in 1 of 100).
FACTOR_16_BIT_NUMBER = 16
SINGLE_NUMBERS = ("loss", "evaluation loss", "training metrics", "evaluation metrics")
HALF = ("bf16", "fp16")
#: Machine epsilon of what is computed with each precision, twice its unit roundoff. TF32 is float32 whose products
#: round their factors to 11 significant bits.
EPSILON = {"fp64": 2.0**-52, "fp32": 2.0**-23, "tf32": 2.0**-10, "bf16": 2.0**-7, "fp16": 2.0**-10}
#: Rounding errors that are always allowed, relative to the norm of all tensors: those of long sums in the wide formats,
#: where each addition rounds, and the one of the result, or of a factor, in the short formats.
_ALWAYS = {"fp64": 64.0, "fp32": 64.0, "tf32": 1.0, "bf16": 1.0, "fp16": 1.0}
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
#: Who alone has something that both runs should have.
ONE_PROCESS, THE_RANKS = "one process", "the ranks"
NUMBERS = ("loss", "training metrics", "gradients", "parameters", "buffers", "evaluation loss", "evaluation metrics")


@dataclass(frozen=True)
class Difference:
    """How far something is from that of the serial run.

    Attributes:
        value: Relative to the norm of all tensors of the kind, or to the number itself; 1 where unequal things can't be
            subtracted, infinite where only one run has it.
        where: Tensor, metric or sample with the largest difference.
        step: Where it was found.
        only_in: Who alone has it: :data:`ONE_PROCESS`, :data:`THE_RANKS`, or empty if both do.
    """

    value: float
    where: str
    step: int
    only_in: str = ""


#: By quantity, then by step.
Series = dict[str, dict[int, Difference]]


def series(reference: RankRecord, ranks: Sequence[RankRecord], *, after: int = 0) -> Series:
    """The differences of a run from the serial run.

    Args:
        reference: The serial run.
        ranks: The compared run, of all its ranks.
        after: The step from which the compared run was resumed.
    """
    found: Series = {name: {} for name in (*EXACT, *NUMBERS)}
    expected_steps = {step for step in reference.steps if step > after}
    trained = {step for rank in ranks for step, record in rank.steps.items() if record.shard[1]}
    for step in sorted(expected_steps ^ trained):
        only_in = ONE_PROCESS if step in expected_steps else THE_RANKS
        found["sample order"][step] = Difference(math.inf, "the whole step", step, only_in)
    for step in sorted(expected_steps & trained):
        expected = reference.steps[step]
        records = [rank.steps[step] for rank in ranks if step in rank.steps]
        training = [record for record in records if record.shard[1]]
        _compare_samples(found, step, expected, training)
        _compare_sums(found, step, expected, training)
        _compare_states(found, step, reference, records)
        hidden = any(rank.hides_gradients for rank in ranks)
        gradients = _largest(record.distances.get(GRADIENTS, {}) for record in records)
        if gradients or not hidden:
            scales = expected.distances.get(GRADIENTS, {})
            _compare_tensors(found["gradients"], step, gradients, scales, reference.tied)
    _compare_evaluations(found, reference, ranks[0], after)
    return found


def _compare_states(found: Series, step: int, reference: RankRecord, records: Sequence[StepRecord]) -> None:
    """Compares the model's parameters and buffers after a step."""
    distances = _largest(record.distances.get(STATE, {}) for record in records)
    scales, parameters = reference.steps[step].distances.get(STATE, {}), set(reference.parameters)
    for quantity, are_parameters in (("parameters", True), ("buffers", False)):
        mine = {name: far for name, far in distances.items() if (name in parameters) is are_parameters}
        theirs = {name: near for name, near in scales.items() if (name in parameters) is are_parameters}
        _compare_tensors(found[quantity], step, mine, theirs, reference.tied)


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
    found: dict[int, Difference],
    step: int,
    distances: Mapping[str, float],
    scales: Mapping[str, Any],
    tied: Sequence[Sequence[str]],
) -> None:
    """Finds the largest difference of tensors in a step, or one that only one of the runs has.

    Args:
        found: Gets the difference.
        step: The step.
        distances: Of the tensors that the ranks have.
        scales: What the serial run has of its tensors.
        tied: Names that are one parameter in the serial run; either run may show it under any of them.
    """
    if not distances and not scales:
        return
    for names, others, only_in in ((scales, distances, ONE_PROCESS), (distances, scales, THE_RANKS)):
        known = set(others).union(*(group for group in tied if any(name in others for name in group)))
        missing = next((name for name in names if name not in known), None)
        if missing is not None:
            found[step] = Difference(math.inf, missing, step, only_in)
            return
    scale = math.sqrt(sum(near * near for _, near in scales.values())) or 1.0
    shared = [name for name in distances if name in scales]
    name = max(shared, key=lambda each: distances[each], default="")
    found[step] = Difference(distances[name] / scale if name else 0.0, name, step)


def _compare_evaluations(found: Series, reference: RankRecord, rank: RankRecord, after: int) -> None:
    expected = {(entry["step"], entry["split"]): entry for entry in reference.evaluations}
    theirs = {(entry["step"], entry["split"]): entry for entry in rank.evaluations}
    for step, split in sorted(expected.keys() ^ theirs.keys()):
        # A resumed run may begin before or after the evaluation that follows the step.
        if step > after:
            only_in = ONE_PROCESS if (step, split) in expected else THE_RANKS
            found["evaluation count"][step] = Difference(math.inf, f"{split} as a whole", step, only_in)
    for step, split in sorted(expected.keys() & theirs.keys()):
        mine, serial = theirs[step, split], expected[step, split]
        for name, difference in (
            ("loss", Difference(_relative(mine["loss"], serial["loss"]), split, step)),
            ("metrics", _metrics_difference(mine["metrics"], serial["metrics"], split, step)),
            ("count", Difference(float(abs(mine["count"] - serial["count"])), split, step)),
        ):
            before = found[f"evaluation {name}"].get(step)
            if before is None or difference.value > before.value:
                found[f"evaluation {name}"][step] = difference


def _metrics_difference(mine: Mapping[str, float], serial: Mapping[str, float], split: str, step: int) -> Difference:
    for name in (*serial, *mine):
        if not (name in mine and name in serial):
            return Difference(math.inf, f"{split} {name}", step, ONE_PROCESS if name in serial else THE_RANKS)
    differences = {name: _relative(value, serial[name], at_least=1.0) for name, value in mine.items()}
    name = max(differences, key=lambda each: differences[each], default="")
    return Difference(differences.get(name, 0.0), f"{split} {name}".rstrip(), step)


def _relative(mine: float, theirs: float, at_least: float = 1e-12) -> float:
    if mine == theirs or (math.isnan(mine) and math.isnan(theirs)):
        return 0.0
    difference = abs(mine - theirs) / max(abs(theirs), at_least)
    return difference if math.isfinite(difference) else math.inf


class Limits:
    """The limit of each quantity at each step.

    Args:
        reordered: The differences of each reordered serial run.
        rounded: How far the serial run is from itself in float32; ``None`` except in 16-bit formats.
        precision: Of these runs; for float32 with shorter factors, the format of those.
        tolerance: Takes the place of what is measured, if given.
        evaluated: Samples of the smallest evaluation.
        batch: Samples of the smallest batch.
        order_is_free: Runs in float64 have shown that the order of the samples changes nothing but rounding. What it
            changes in this format is rounding then, however much it is: an activation near zero, or a variance, may
            make it large in the first step already.
    """

    def __init__(
        self,
        reordered: Sequence[Series],
        rounded: Series | None,
        precision: str,
        tolerance: float | None,
        evaluated: int,
        batch: int,
        order_is_free: bool = False,
    ) -> None:
        self._reordered, self._precision, self._tolerance = reordered, precision, tolerance
        self._order_is_free = order_is_free
        self._rounded, self._spreads = rounded, [*reordered]
        if rounded is not None:
            # If no formula depends on the order, these are more samples of how far rounding moves the run.
            self._spreads = [rounded] if self.order_matters() else [rounded, *reordered]
        self._ties = {"evaluation metrics": _TIES / max(evaluated, 1), "training metrics": _TIES / max(batch, 1)}

    def spread(self, quantity: str, step: int) -> float:
        """The largest difference that rounding makes in the serial run, up to a step."""
        return _largest_up_to(step, quantity, self._spreads)

    def limit(self, quantity: str, step: int) -> float:
        """The largest difference at a step that counts as equal."""
        if quantity in EXACT:
            return 0.0
        return self._measured_limit(quantity, step) if self._tolerance is None else self._tolerance

    def _measured_limit(self, quantity: str, step: int) -> float:
        limit = self._factor(quantity) * self.spread(quantity, step)
        if step == 1 and not self._order_is_free:
            limit = min(limit, self._cap(quantity))
        if self._precision != "fp64":
            limit = max(limit, self._ties.get(quantity, 0.0))
        return max(limit, _ALWAYS[self._precision] * EPSILON[self._precision])

    def _factor(self, quantity: str) -> int:
        if self._rounded is None:
            return FACTOR
        return FACTOR_16_BIT_NUMBER if quantity in SINGLE_NUMBERS else FACTOR_16_BIT

    def _cap(self, quantity: str) -> float:
        """What no reordering changes in the first step by rounding."""
        if self._rounded is None:
            return math.sqrt(EPSILON[self._precision])
        spread = _largest_up_to(1, quantity, [self._rounded])
        return self._factor(quantity) * max(EPSILON[self._precision], spread)

    def order_matters(self) -> Difference | None:
        """What the order of the samples in a batch changes in the first step by more than rounding, if anything."""
        if self._order_is_free:
            return None
        for quantity in ("loss", "gradients"):
            for each in self._reordered:
                found = each.get(quantity, {}).get(1)
                if found is not None and found.value > self._cap(quantity):
                    return found
        return None


def _largest_up_to(step: int, quantity: str, runs: Iterable[Series]) -> float:
    values = (each.get(quantity, {}) for each in runs)
    return max((found.value for steps in values for at, found in steps.items() if at <= step), default=0.0)


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


def bitwise_difference(run: RankRecord, again: RankRecord, *, after: int = 0) -> Difference | None:
    """The first tensor whose bits differ after a step, or a step or tensor that only one of two runs has.

    Args:
        run: One of them; it is called :data:`ONE_PROCESS` where it alone has something.
        again: The other one.
        after: The step from which ``again`` was resumed.
    """
    for step in sorted({step for step in (*run.steps, *again.steps) if step > after}):
        theirs, mine = (each.steps[step].hashes if step in each.steps else {} for each in (run, again))
        for name in dict.fromkeys((*theirs, *mine)):
            if mine.get(name) != theirs.get(name):
                return Difference(1.0, name, step)
    return None
