"""Where two runs part, and why: the first step, the first module, and the cause as far as experiments tell."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from distrain.config.groups import CompressionConfig
from distrain.config.schema import Config
from distrain.errors import Failed, Stopped, described, termination_behind
from distrain.torch_internals import BatchNorm
from distrain.training.trainer import Trainer
from distrain.verification import causes
from distrain.verification.causes import Evidence
from distrain.verification.certificate import Parting
from distrain.verification.comparison import (
    EPSILON,
    Difference,
    Limits,
    bitwise_difference,
    first_parting,
    judge,
    series,
)
from distrain.verification.probe import LossFindings, ModuleFindings, Probe
from distrain.verification.rank_runs import RankRuns
from distrain.verification.recorder import GRADIENTS, RankRecord
from distrain.verification.reference import Reference
from distrain.verification.trace import Trace, Tracer, first_difference

#: Differences of a module's outputs, relative to the largest, that are no rounding: times the root of epsilon.
_MODULE_LIMIT = 0.01
#: Most modules that are examined for one that computes a wrong gradient.
_MOST_EXAMINED = 60

FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True)
class _Place:
    """A module where the runs part, and in which direction; its class."""

    name: str
    kind: str
    direction: str


@dataclass
class Search:
    """What is known before the search.

    Attributes:
        ranks: Does the runs.
        config: The user's configuration.
        precision: Of the runs that part.
        serial: The serial run.
        asked: The asked run, of all ranks.
        limits: Of their differences.
        reference: The serial run's tensors.
        float64_equal: In float64 the runs are equal; ``None`` if that was not compared.
    """

    ranks: RankRuns
    config: Config
    precision: str
    serial: RankRecord
    asked: Sequence[RankRecord]
    limits: Limits
    reference: Reference
    float64_equal: bool | None

    def find(self, quantity: str, difference: Difference) -> Parting:
        """Searches for the place and the cause; all ranks call it together, and rank 0 does the experiments.

        Args:
            quantity: What differs first.
            difference: Its first difference.
        """
        step = difference.step
        place, calls = self._place(quantity, difference)
        evidence = Evidence(self.config, self.precision, quantity, difference.where, self.serial, self.asked)
        evidence.float64_equal, evidence.only_in = self.float64_equal, difference.only_in
        order = self.limits.order_matters()
        evidence.order_matters = "" if order is None else order.where or "the loss"
        if self.config.compression.name != "none":
            evidence.equal_without_compression = self._is_equal_without_compression()
        failure = ""
        if self.ranks.world.rank == 0:
            try:
                place = self._experiments(evidence, step, place, calls)
            except Stopped:
                raise
            except Failed as error:
                if termination_behind(error) is not None:
                    raise
                failure = f"the experiments failed {described(error.__cause__ or error)}"
            except Exception as error:  # a user's module may raise anything where it is run alone
                failure = f"the experiments failed {described(error)}"
        cause = causes.find(evidence)
        told = {
            "place": None if place is None else dataclasses.asdict(place),
            "cause": ["", failure] if cause is None else [cause.name, cause.advice],
        }
        first = self.ranks.exchange(told)[0]
        name, kind, direction = ("", "", "") if first["place"] is None else first["place"].values()
        found, why = first["cause"]
        limit = self.limits.limit(quantity, step)
        return Parting(
            self.precision,
            step,
            quantity,
            difference.where,
            difference.value,
            limit,
            name,
            kind,
            direction,
            found,
            why,
            difference.only_in,
        )

    # --- the place ---------------------------------------------------------------------------------------------------

    def _place(self, quantity: str, difference: Difference) -> tuple[_Place | None, list[str]]:
        """The module where the runs part, and the names of modules in the order in which they end."""
        if quantity.startswith(("sample", "evaluation")):
            return None, []
        step, traced = difference.step, self._uncompiled()
        serial = Trace()
        if self.ranks.world.rank == 0:
            serial = self._trace(self._as_serial(traced, "traced_serial"), step, alone=True)
        asked = self._trace(self._as_asked(traced, "traced"), step, alone=False)
        told = {"serial": dataclasses.asdict(serial), "asked": dataclasses.asdict(asked)}
        everyone = self.ranks.exchange(told)
        serial = Trace.from_plain(everyone[0]["serial"])
        traces = [Trace.from_plain(each["asked"]) for each in everyone]
        calls = [call.name for call in serial.calls.values()]
        kinds = {call.name: call.kind for call in serial.calls.values()}
        found = first_difference(serial, traces, _MODULE_LIMIT * math.sqrt(EPSILON[self.precision]))
        if found is not None:
            return _Place(found.name, found.kind, FORWARD), calls
        tensor = difference.where
        if quantity == "gradients" and not difference.only_in:
            tensor = self._first_in_backward_order(step)
        owner = tensor.rpartition(".")[0]
        if quantity in ("gradients", "parameters", "buffers") and owner in kinds:
            return _Place(owner, kinds[owner], BACKWARD if quantity == "gradients" else ""), calls
        return None, calls

    def _first_in_backward_order(self, step: int) -> str:
        """The parameter whose gradient is the first to differ in the backward pass."""
        scales = self.serial.steps[step].distances.get(GRADIENTS, {})
        scale = math.sqrt(sum(near * near for _, near in scales.values())) or 1.0
        limit = self.limits.limit("gradients", step)
        far: dict[str, float] = {}
        for rank in self.asked:
            record = rank.steps.get(step)
            for name, (distance, _) in (record.distances.get(GRADIENTS, {}) if record is not None else {}).items():
                far[name] = max(far.get(name, 0.0), distance / scale)
        # A tied parameter may have further names on the ranks.
        order = [name for name in reversed(self.serial.parameters) if name in far and name in scales]
        return next((name for name in order if not far[name] <= limit), "")

    def _trace(self, config: Config, step: int, *, alone: bool) -> Trace:
        tracers: list[Tracer] = []
        self.ranks.record(
            config,
            self.ranks.alone if alone else self.ranks.world,
            self.reference,
            lambda trainer: tracers.append(Tracer(trainer, step)),
        )
        return tracers[0].trace

    def _uncompiled(self) -> Config:
        """The asked run without torch.compile, whose modules can't be watched."""
        config = self.ranks.short.asked(self.precision, "traced")
        return dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, compile=False))

    def _as_serial(self, config: Config, name: str) -> Config:
        serial = self.ranks.short.serial(self.precision, name)
        return dataclasses.replace(serial, trainer=config.trainer)

    def _as_asked(self, config: Config, name: str) -> Config:
        asked = self.ranks.short.asked(self.precision, name)
        return dataclasses.replace(asked, trainer=config.trainer)

    # --- the cause ---------------------------------------------------------------------------------------------------

    def _is_equal_without_compression(self) -> bool:
        asked = self.ranks.short.asked(self.precision, "uncompressed")
        plain = dataclasses.replace(asked, compression=CompressionConfig("none"))
        record = self.ranks.record(plain, self.ranks.world, self.reference)
        everyone = self.ranks.exchange({"asked": dataclasses.asdict(record)})
        records = [RankRecord.from_plain(each["asked"]) for each in everyone]
        return first_parting(judge(series(self.serial, records), self.limits)) is None

    def _experiments(self, evidence: Evidence, step: int, place: _Place | None, calls: Sequence[str]) -> _Place | None:
        """Completes the evidence, in one process; returns the place as experiments correct it."""
        evidence.content_same_again = self._reads_the_same_twice()
        again = self.ranks.record(self._as_serial(self._uncompiled(), "repeated"), self.ranks.alone, self.reference)
        same = bitwise_difference(self.serial, again) is None
        evidence.same_again = same or self.config.trainer.compile is not False
        if evidence.quantity.startswith("sample"):
            return place
        names = list(dict.fromkeys(calls))
        if place is not None and place.direction == FORWARD:
            names = [place.name]
        elif place is not None and place.direction == BACKWARD:
            # A wrong gradient was made by this module, or by one that ran after it.
            names = names[names.index(place.name) :][-_MOST_EXAMINED:]
        elif place is not None:
            names = [place.name]
        else:
            names = []
        probes: list[Probe] = []
        modules: dict[str, nn.Module] = {}

        def prepare(trainer: Trainer) -> None:
            modules.update(trainer.strategy.own_modules()[0].named_modules())
            probes.append(Probe(trainer, step, names))

        self.ranks.record(self._as_serial(self._uncompiled(), "probed"), self.ranks.alone, self.reference, prepare)
        evidence.loss = probes[0].examine_loss()
        backward = place is not None and place.direction == BACKWARD
        findings = self._wrong_gradient(probes[0], names) if backward else None
        if findings is not None:
            place = _Place(findings.name, findings.kind, BACKWARD)
        elif place is not None:
            findings = probes[0].examine(place.name)
        if evidence.loss != LossFindings() and (place is None or place.direction != FORWARD):
            # The loss explains it; no module does.
            return None
        evidence.module = findings
        evidence.module_is_batchnorm = place is not None and isinstance(modules.get(place.name), BatchNorm)
        return place

    @staticmethod
    def _wrong_gradient(probe: Probe, names: Sequence[str]) -> ModuleFindings | None:
        """The innermost module whose gradient depends on the number of samples, the last one in forward order."""
        found = [findings for name in names if (findings := probe.examine(name)) is not None]
        wrong = [findings for findings in found if findings.backward_depends]
        holders = {
            outer.name
            for outer in wrong
            for inner in wrong
            if inner is not outer and (not outer.name or inner.name.startswith(f"{outer.name}."))
        }
        return next((findings for findings in reversed(wrong) if findings.name not in holders), None)

    def _reads_the_same_twice(self) -> bool:
        """Whether a few training samples are the same when they are read again."""
        split = self.ranks.short.splits.train
        positions = torch.arange(min(len(split), 8))
        first, second = split.read(positions), split.read(positions)
        return torch.equal(first.images, second.images)
