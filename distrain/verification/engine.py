"""Does the short runs one after another, on these ranks, and compares them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distrain.checkpoint import format as checkpoint_format
from distrain.config.load import to_container
from distrain.config.schema import Config
from distrain.errors import ConfigError, Failed, Stopped, config_error
from distrain.files.terminal import print_to_stderr
from distrain.models.trial import ModelTrial
from distrain.reporting.origin import Origin
from distrain.runtime.command_folder import RUNS, agreed_folder
from distrain.runtime.device import choose_device
from distrain.runtime.world import World
from distrain.training import auto_format
from distrain.training.assembly import build_model
from distrain.training.run_plan import RunPlan
from distrain.verification import by_design, short_runs
from distrain.verification.certificate import BY_DESIGN, DIFFERENT, EQUAL, Certificate, Parting, Phase
from distrain.verification.comparison import (
    EXACT,
    FACTOR,
    FACTOR_16_BIT,
    FACTOR_16_BIT_NUMBER,
    HALF,
    Limits,
    bitwise_difference,
    first_parting,
    judge,
    series,
)
from distrain.verification.parting import Search
from distrain.verification.products import format_of_products
from distrain.verification.rank_runs import RankRuns
from distrain.verification.recorder import GRADIENTS, RankRecord
from distrain.verification.reference import Reference
from distrain.verification.short_runs import ShortRuns

#: Runs of one process with the samples in another order.
_REORDERED = 2

#: The strategy of one process.
SINGLE = "single"
#: A command that is not refused.
EXAMPLE = "distrain verify nproc=2 -- strategy=ddp"


@dataclass(frozen=True)
class Options:
    """What is asked of a verification.

    Attributes:
        steps: Updates of each run.
        tolerance: Limit of relative differences; ``None``: measured.
        float64: Whether to compare in float64 too.
        folder: For the runs and the certificate; all hosts see it. ``None``: a new one below ``outputs/verify``.
        keep: Keep the runs' folders.
        command: What to type to do it again.
        example: What to type instead of a command that is refused.
    """

    steps: int = 10
    tolerance: float | None = None
    float64: bool = True
    folder: Path | None = None
    keep: bool = False
    command: str = ""
    example: str = EXAMPLE


def check(config: Config, world: World, example: str = EXAMPLE) -> tuple[RunPlan, ModelTrial]:
    """Refuses what can't be verified, before any process group forms.

    Args:
        config: The training.
        world: This rank's place.
        example: A whole command that is not refused, for messages.

    Returns:
        The run as this rank will do it, and what a trial found out about its model.

    Raises:
        ConfigError: One line that names the key.
    """
    if world.size < 2:
        problem = "a run of one process is what others are compared with; start several ranks, as in"
        raise config_error("nproc", f"{problem}: {example}")
    if config.strategy.name == SINGLE:
        problem = "is what others are compared with; name the strategy that you want to verify, as in"
        raise ConfigError("strategy", SINGLE, f"{problem}: {example}")
    for key, value, usual in (("run_dir", config.run_dir, None), ("resume", config.resume, "auto")):
        if value != usual:
            problem = (
                "is chosen by this command for each of its runs; leave it out (folder=… is where it writes), as in"
            )
            raise ConfigError(key, value, f"{problem}: {example}")
    plan = RunPlan.resolve(config, world)
    return plan, plan.check(warn=False)


def verify(
    config: Config, world: World, options: Options, show: Callable[[Certificate, Path], object] = lambda *_: None
) -> Certificate:
    """Compares a training on these ranks with that of one process; all ranks call it together.

    Args:
        config: The training.
        world: This rank's place.
        options: What is asked.
        show: Called on rank 0 with the certificate and its file, before any rank returns.

    Returns:
        The certificate, the same on all ranks.

    Raises:
        ConfigError: The configuration can't run.
        Failed: A run failed, or was stopped; which rank, where and why was said.
    """
    plan, trial = check(config, world, options.example)
    with contextlib.closing(plan.load()) as splits:
        folder = agreed_folder(config, world, "verify", options.folder)
        runs = short_runs.cut(plan, trial, splits, options.steps, folder / RUNS)
        verification = _Verification(plan, options, runs)
        try:
            certificate = verification.certify()
        except Stopped as stopped:
            if world.rank == 0:
                print_to_stderr(f"distrain: {stopped}; there is no certificate")
            raise Failed from stopped
        finally:
            if world.rank == 0 and not options.keep:
                shutil.rmtree(runs.folder, ignore_errors=True)
    if world.rank == 0:
        show(certificate, certificate.write(folder))
    # A launcher ends all ranks when one has ended because the certificate is a bad one.
    verification.meet()
    return certificate


class _Verification:
    """The runs of one verification, on one rank."""

    def __init__(self, plan: RunPlan, options: Options, runs: ShortRuns) -> None:
        self._config, self._world, self._options, self._runs = plan.config, plan.world, options, runs
        self._ranks = RankRuns(plan, runs)
        self._remarks: dict[str, list[str]] = {}
        self._asked: list[RankRecord] = []
        self._serial: RankRecord | None = None
        self._order_is_free = False

    def meet(self) -> None:
        """Waits for all ranks."""
        with self._ranks.meeting():
            pass

    def certify(self) -> Certificate:
        """Does all runs and compares them."""
        origin = Origin(Path.cwd() if self._world.rank == 0 else None)
        statement = by_design.statement(self._config, self._world.size)
        phases: list[Phase] = []
        parting: Parting | None = None
        for precision in self._precisions():
            phase, limits = self._phase(precision)
            phases.append(phase)
            if precision == "fp64":
                self._order_is_free = limits.order_matters() is None
            if parting is None and not phase.equal and not statement:
                wide = phases[0].equal if phases[0].precision == "fp64" and len(phases) > 1 else None
                parting = self._find_parting(phase, limits, wide)
        verdict = EQUAL
        if statement:
            exact = all(each.equal for phase in phases for each in phase.verdicts if each.quantity in EXACT)
            verdict = BY_DESIGN if exact else DIFFERENT
        elif not all(phase.equal for phase in phases):
            verdict = DIFFERENT
        container = to_container(self._config)
        text = json.dumps(container, sort_keys=True, default=str)
        return Certificate(
            verdict,
            statement,
            self._measured() if statement else {},
            phases,
            parting,
            self._runs.steps,
            short_runs.described(self._config),
            self._world.size,
            self._asked[0].mesh,
            self._runs.changed,
            self._bytes_per_step(),
            {
                **origin.collect(),
                **({"command": self._options.command} if self._options.command else {}),
                "hosts": [rank.host for rank in self._asked],
                "configuration_sha256": hashlib.sha256(text.encode()).hexdigest(),
                "configuration": container,
                "limits": _LIMITS_IN_WORDS if self._options.tolerance is None else "tolerance=… gives all limits",
            },
        )

    # --- phases ------------------------------------------------------------------------------------------------------

    def _precisions(self) -> list[str]:
        """The number formats to compare in: float64 first, where the model can compute in it."""
        own = self._own_precision()
        if own == "fp64" or not self._options.float64 or by_design.statement(self._config, self._world.size):
            return [own]
        trainer = dataclasses.replace(self._config.trainer, precision="fp64")
        wide = dataclasses.replace(self._config, trainer=trainer)
        try:
            self._ranks.plan_of(wide, self._world).check(warn=False)
        except ConfigError as error:
            self._remarks[own] = [f"float64 was left out: {error}"]
            return [own]
        return ["fp64", own]

    def _own_precision(self) -> str:
        """The run's own precision; ``auto`` is measured here, once for all runs."""
        if self._config.trainer.precision != "auto":
            return self._config.trainer.precision
        plan = self._ranks.plan_of(self._runs.config, self._world)
        with self._ranks.meeting() as runtime:
            make = functools.partial(build_model, plan, self._runs.splits)
            return auto_format.resolve_auto(plan.config, runtime, self._runs.splits, plan.task, make).trainer.precision

    def _phase(self, precision: str) -> tuple[Phase, Limits]:
        """Does the runs of one number format and compares them."""
        runs, reference = self._runs, Reference(self._runs.folder / precision / "reference")
        alone: list[RankRecord] = []
        self._ranks.skipped = []
        if self._world.rank == 0:
            for reorders in range(_REORDERED + 1):
                config = runs.serial(precision, f"serial_{reorders}")
                options: dict[str, Any] = {"writes": not reorders, "reorders": reorders}
                alone.append(self._ranks.record(config, self._ranks.alone, reference, **options))
                if precision == "fp16" and not reorders:
                    steps = alone[0].steps.items()
                    self._ranks.skipped = [step for step, record in steps if GRADIENTS not in record.distances]
            if precision in HALF:
                # Last: see below.
                config = runs.serial("fp32", f"unrounded_{precision}")
                alone.append(self._ranks.record(config, self._ranks.alone, reference))
        if precision == "fp16":
            # The sum of a whole batch overflows at a loss scale at which the sums of its shares do not.
            self._ranks.skipped = self._ranks.exchange({"skipped": self._ranks.skipped})[0]["skipped"]
        config = runs.saving(precision, "asked")
        asked = self._ranks.record(config, self._world, reference)
        resumed: RankRecord | None = None
        if runs.save_at is not None:
            folder = checkpoint_format.checkpoints_folder(Path(str(config.run_dir)))
            checkpoint = checkpoint_format.checkpoint_path(folder, runs.save_at)
            config = runs.resumed(precision, "resumed", checkpoint)
            resumed = self._ranks.record(config, self._world, reference, first_step=runs.save_at)
        mine = {
            "alone": [dataclasses.asdict(record) for record in alone],
            "asked": dataclasses.asdict(asked),
            "resumed": None if resumed is None else dataclasses.asdict(resumed),
        }
        everyone = self._ranks.exchange(mine)
        serial, *others = [RankRecord.from_plain(plain) for plain in everyone[0]["alone"]]
        asked_ranks = [RankRecord.from_plain(rank["asked"]) for rank in everyone]
        self._asked, self._serial = asked_ranks, serial
        evaluated = min((entry["count"] for entry in serial.evaluations), default=1)
        smallest = min(record.count for record in serial.steps.values())
        spreads = [series(serial, [each]) for each in others]
        rounded = spreads.pop() if precision in HALF else None
        tolerance, free = self._options.tolerance, self._order_is_free
        # Asked after the runs, which may have set it.
        products = format_of_products(precision, choose_device(self._config, self._world).type)
        limits = Limits(spreads, rounded, products, tolerance, evaluated, smallest, free)
        remarks = [*self._remarks.get(precision, [])]
        if products != precision:
            remarks.append(f"products may round their factors to {products}, which gives the limits")
        if self._ranks.skipped:
            skipped = ", ".join(map(str, self._ranks.skipped))
            remarks.append(f"updates left out in all runs, since the gradient of one process overflows: step {skipped}")
        verdicts = judge(series(serial, asked_ranks), limits)
        blind = min((each.blind_from for each in verdicts if each.blind_from is not None), default=None)
        if blind is not None:
            remarks = [*remarks, f"from step {blind} on rounding alone moves the serial run so far that little is said"]
        if resumed is None:
            return Phase(precision, verdicts, products, remarks=remarks), limits
        resumed_ranks = [RankRecord.from_plain(rank["resumed"]) for rank in everyone]
        bitwise = bitwise_difference(asked_ranks[0], resumed_ranks[0], after=runs.save_at or 0) is None
        again = judge(series(serial, resumed_ranks, after=runs.save_at or 0), limits)
        return Phase(precision, verdicts, products, runs.save_at, bitwise, again, remarks), limits

    # --- results -----------------------------------------------------------------------------------------------------

    def _find_parting(self, phase: Phase, limits: Limits, float64_equal: bool | None) -> Parting | None:
        """Where the runs of a phase part."""
        found = first_parting(phase.verdicts)
        reference = Reference(self._runs.folder / phase.precision / "reference")
        if found is not None and self._serial is not None:
            return Search(
                self._ranks,
                self._config,
                phase.precision,
                self._serial,
                self._asked,
                limits,
                reference,
                float64_equal,
            ).find(*found)
        found = first_parting(phase.resumed)
        if found is None:
            return None
        quantity, difference = found
        return Parting(
            phase.precision,
            difference.step,
            quantity,
            difference.where,
            difference.value,
            limits.limit(quantity, difference.step),
            cause="resume",
            only_in=difference.only_in,
            why=f"only the run that was resumed at step {phase.resumed_from} differs; something that training needs is "
            "not saved, or is not restored",
        )

    def _bytes_per_step(self) -> dict[str, float]:
        totals: dict[str, int] = {}
        for rank in self._asked:
            for record in rank.steps.values():
                for kind, size in record.bytes.items():
                    totals[kind] = totals.get(kind, 0) + size
        return {kind: total / self._runs.steps for kind, total in totals.items()}

    def _measured(self) -> dict[str, Any]:
        """What can be said of a run that is not meant to be equal."""
        assert self._serial is not None, "a phase has been done"
        last = max(self._serial.steps)
        records = [rank.steps[last] for rank in self._asked if last in rank.steps]
        count = sum(record.count for record in records)
        loss = sum(record.loss_sum for record in records) / max(count, 1)
        serial = self._serial.steps[last]
        sent = sum(self._bytes_per_step().values())
        plain = sum(rank.uncompressed_bytes for rank in self._asked)
        steps = [record for rank in self._asked for record in rank.steps.values()]
        copies = max((record.copies for record in steps if record.copies is not None), default=None)
        found = {
            f"loss of step {last}": f"{loss:.6g}, of one process {serial.loss_sum / max(serial.count, 1):.6g}",
            "bytes a step, all ranks": f"{sent:,.0f}, {plain:,.0f} without compression",
        }
        if copies is not None:
            found["largest distance of a rank's copy from the model"] = f"{copies:.1e} of its norm"
        return found


_LIMITS_IN_WORDS = (
    f"{FACTOR} times the largest distance between the serial run and {_REORDERED} serial runs whose samples are in "
    "another order within each forward pass (a measured spread of rounding, up to the same step); never below some "
    "rounding errors of the format, and in the first step never above the root of its epsilon, unless float64 has "
    "shown that the order changes nothing but rounding. In bf16 and fp16: "
    f"{FACTOR_16_BIT} times, and for a loss or metric {FACTOR_16_BIT_NUMBER} times, the largest distance between the "
    "serial run and those, or the same run in float32 (what rounding to the format does to it), up to the same step; "
    "never below the format's epsilon. Where torch may round factors of float32 products to TF32 or bf16 (`products`), "
    "never below the epsilon of that format. Distances are norms of a tensor's difference, relative to the norm of all "
    "tensors of its kind"
)
