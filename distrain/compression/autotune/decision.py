"""Decides which compressor makes steps fastest, by measuring the first steps of a run."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence

import torch.distributed as dist
from typing_extensions import override

from distrain.compression.autotune.candidate_set import CandidateSet
from distrain.compression.autotune.candidates import CandidateTable, choose, trial_order
from distrain.compression.autotune.compressor_cost import CompressorCost, measure_cost
from distrain.compression.autotune.link_model import measure_link
from distrain.compression.autotune.simulation import predict_step
from distrain.compression.autotune.step_probe import Phase, StepProbe, slowest
from distrain.compression.autotune.step_trace import StepTrace, median_with_error
from distrain.compression.base import Compressor
from distrain.compression.bucket import Bucket

log = logging.getLogger(__name__)

#: Steps with exchanges before anything is timed: memory, caches, compilation.
WARMUP_STEPS = 2
#: Steps without compression, then steps that hold their exchanges back.
ORDINARY_STEPS, HELD_STEPS = 3, 3
#: A candidate's work is measured as of so many steps later, when its own warm-up is over.
STEPS_AHEAD = 1_000_000
#: Steps after the choice whose duration is compared with the expected one.
CHECKED_STEPS = 30
#: Steps may take longer than expected, and longer than without compression, by these fractions.
SURPRISING, TOO_SLOW = 0.1, 0.03


class CompressorDecision(StepProbe):
    """Chooses among candidates after the first steps, and checks the choice for some further steps.

    Link, backward pass and each candidate's own work are measured and predict each candidate's step. The most promising
    ones are then tried in real steps, where those depend on this group's exchanges alone.

    All ranks of the group decide by the same numbers, each the slowest rank's, and so decide alike.

    Args:
        compressor: The observed compressor, which uses the active candidate.
        candidates: The candidates.
        trial_seconds: Approximate duration of the trial in real steps; 0: no trial.

    Attributes:
        table: What is known about the candidates; ``None`` before the measurement.
    """

    def __init__(self, compressor: Compressor, candidates: CandidateSet, trial_seconds: float) -> None:
        super().__init__(compressor, ORDINARY_STEPS, HELD_STEPS)
        self.table: CandidateTable | None = None
        self._candidates = candidates
        self._trial_seconds = trial_seconds
        self._warmup_steps = 0
        self._bucket_copies: list[Bucket] = []
        self._held_steps_begun = 0

    def record_gradients(self, bucket: Bucket) -> None:
        """Copies a bucket about to be exchanged, in the step on whose gradients the candidates' work is measured."""
        if self._held_steps_begun == HELD_STEPS:
            self._bucket_copies.append(bucket.clone())

    @override
    def is_warm(self) -> bool:
        self._warmup_steps += self.communicator.size > 1
        return self._warmup_steps >= WARMUP_STEPS

    @override
    def prepare_held_step(self) -> None:
        self._held_steps_begun += 1

    @override
    def evaluate(self, ordinary: list[StepTrace], held: list[StepTrace]) -> Phase | None:
        # Together the copies are as large as the model, so they are not kept.
        copies, self._bucket_copies, self._held_steps_begun = self._bucket_copies, [], 0
        if len(ordinary) < ORDINARY_STEPS or len(held) < HELD_STEPS:
            # The strategy does not exchange all buckets in each step.
            log.warning("compression=auto can't observe this strategy's steps, so it compresses nothing")
            self._candidates.choose("none")
            return None
        self.table = table = self._measure(ordinary, held, copies)
        names = table.shortlist()
        if len(names) > 1 and self._tries:
            return self._trial(table, names, lambda: self._choose_by_trial(table, names))
        return self._choose_and_check(table, choose({**table.predicted, "none": table.uncompressed}, {}))

    @property
    def _tries(self) -> bool:
        """Whether candidates are tried: if configured, and if steps do not depend on ranks outside of the group."""
        return self._trial_seconds > 0 and self.communicator.size == world_size()

    def _measure(
        self, ordinary: Sequence[StepTrace], held: Sequence[StepTrace], copies: Sequence[Bucket]
    ) -> CandidateTable:
        link = measure_link(self.communicator, self.device, max(bucket.bytes for bucket in copies))
        own_costs = {}
        for name in self._candidates.names:
            compressor = self._candidates.new_compressor(name)
            compressor.step = self.compressor.step + STEPS_AHEAD
            views = [self._candidates.view(name, bucket) for bucket in copies]
            own_costs[name] = measure_cost(compressor, views, self.communicator).to_plain()
        compute, gathered = self.gather_compute_times(held, {"costs": own_costs})
        after_exchange = max(statistics.median(step.after_exchange for step in steps) for steps in compute)
        table = CandidateTable(link, after_exchange)
        for name in own_costs:
            costs = [CompressorCost.from_plain(each["costs"][name]) for each in gathered]
            table.sent[name] = costs[0].sent
            table.work[name] = max(cost.seconds for cost in costs)
            table.predicted[name] = predict_step(compute, costs, link)
        table.add_measured("none", self._slowest_spans(ordinary))
        return table

    def _trial(self, table: CandidateTable, names: Sequence[str], evaluate: Callable[[], Phase | None]) -> Phase:
        """Candidates take turns in real steps; ``evaluate`` is called with their durations in the table."""
        order = trial_order(names, sum(map(table.expected, names)), self._trial_seconds)

        def end(traces: list[StepTrace]) -> Phase | None:
            table.add_trial([trace.label for trace in traces], self._slowest_spans(traces))
            return evaluate()

        return Phase(order, end, prepare=self._candidates.activate)

    def _choose_by_trial(self, table: CandidateTable, names: Sequence[str]) -> Phase:
        return self._choose_and_check(table, choose({name: table.measured[name] for name in names}, table.errors))

    def _choose_and_check(self, table: CandidateTable, name: str) -> Phase:
        self._candidates.choose(name)
        log.info("compression=auto chooses %s on this link (%s)\n%s", name, table.link, table.to_text())
        return Phase([name] * CHECKED_STEPS, lambda traces: self._check(table, name, traces))

    def _check(self, table: CandidateTable, name: str, traces: Sequence[StepTrace]) -> Phase | None:
        """Compares steps after the choice with the expectation that led to it."""
        middle, error = median_with_error(self._slowest_spans(traces))
        seconds = middle + table.after_exchange
        line = f"compression=auto chose {name}, with which a step takes {1000 * seconds:.1f} ms"
        if name != "none" and seconds - error > (1 + TOO_SLOW) * table.expected("none"):
            if self._tries:
                # Steps of any kind may have become slower, so both are measured again.
                return self._trial(table, ["none", name], lambda: self._reconsider(table, name, line))
            self._switch_off(table, line)
        elif seconds - error > (1 + SURPRISING) * table.expected(name):
            log.warning("%s, but %.1f ms were expected", line, 1000 * table.expected(name))
        return None

    def _reconsider(self, table: CandidateTable, name: str, line: str) -> None:
        measured = {each: table.measured[each] for each in ("none", name)}
        if choose(measured, table.errors) == "none":
            self._switch_off(table, line)
        else:
            self._candidates.activate(name)

    def _switch_off(self, table: CandidateTable, line: str) -> None:
        without = 1000 * table.expected("none")
        log.warning("%s, and without compression %.1f ms; compression is switched off", line, without)
        self._candidates.choose("none")

    def _slowest_spans(self, traces: Sequence[StepTrace]) -> list[float]:
        """Seconds of each step until its last exchange had ended, on the rank where that took longest."""
        own = {"spans": [trace.exchange_span for trace in traces]}
        return slowest(self.communicator.all_gather_json(own, self.device), "spans")


def world_size() -> int:
    """Number of ranks of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1
