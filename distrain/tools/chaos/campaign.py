"""All runs of one training: two undisturbed runs, then disturbed runs until enough faults have been injected."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from distrain.tools.chaos import compare
from distrain.tools.chaos.attempt import Attempt
from distrain.tools.chaos.disk import make_disk
from distrain.tools.chaos.disturbed_run import DisturbedRun, Recovery, TrainingSpec
from distrain.tools.chaos.launchers import Launcher
from distrain.tools.chaos.plan import FAULT_KINDS, PlannedRun, draw_kinds, plan_runs
from distrain.tools.testnet.network import VirtualNetwork

_POLL_SECONDS = 0.01
#: A small disk has this many times the size of the reference run's folder, and at least this many bytes.
_DISK_FACTOR, _MIN_DISK_BYTES = 4, 16 << 20
#: Faults whose moments were missed are planned again, in at most this many rounds.
_MAX_ROUNDS = 10


class UnusableTraining(Exception):
    """The training can't be used to test recovery; the message says why."""


@dataclass(frozen=True)
class ReferenceRun:
    """The undisturbed run with which all other runs are compared.

    Attributes:
        folder: Its folder.
        steps: Number of steps.
        startup_seconds: Time from the start to the first logged step.
        step_seconds: Mean time of a later step, with evaluation and saves.
        size_bytes: Size of its folder.
    """

    folder: Path
    steps: int
    startup_seconds: float
    step_seconds: float
    size_bytes: int


@dataclass(frozen=True)
class Campaign:
    """All runs of one training.

    Attributes:
        training: The training under test.
        launcher: Starts the training.
        open_network: Makes a test network and a launcher that starts each rank on a host of it.
        folder: Parent of the runs' folders.
        patience_seconds: A run that logs nothing for this long is given up.
        keep: Keep the folders of correct runs too.
        print_line: Prints a line for the user.
        recoveries: Receives the outcome of each fault.
    """

    training: TrainingSpec
    launcher: Launcher
    open_network: Callable[[], AbstractContextManager[tuple[Launcher, VirtualNetwork]]]
    folder: Path
    patience_seconds: float
    keep: bool
    print_line: Callable[[str], None]
    recoveries: list[Recovery]

    def run(self, kinds: Sequence[str], count: int, per_run: int, seed: str) -> None:
        """Injects ``count`` faults; those whose moment was missed are planned again.

        Args:
            kinds: Names of the kinds of faults to draw from.
            count: Number of faults.
            per_run: Maximum number of faults per run.
            seed: Determines the plans.

        Raises:
            UnusableTraining: An undisturbed run fails, two undisturbed runs differ, or the runs are too short for the
                faults.
        """
        reference = self._make_reference()
        number, remaining_kinds = 1, draw_kinds(kinds, count, f"{seed}/{self.training.name}")
        for _ in range(_MAX_ROUNDS):
            runs = plan_runs(
                remaining_kinds,
                per_run=per_run,
                steps=reference.steps,
                world_size=self.training.world_size,
                startup_seconds=reference.startup_seconds,
                step_seconds=reference.step_seconds,
                seed=f"{seed}/{self.training.name}/{number}",
                first=number,
            )
            for planned in runs:
                self._print(f"plan of run {planned.number}: {'; '.join(map(str, planned.faults))}")
                for recovery in self._run_disturbed(planned, reference):
                    remaining_kinds.remove(recovery.fault.kind)
            number += len(runs)
            if not remaining_kinds:
                return
        missed = f"no moment was found to inject {', '.join(remaining_kinds)}; are the runs too short?"
        raise UnusableTraining(f"{self.training.name}: {missed}")

    def _print(self, line: str) -> None:
        self.print_line(f"{self.training.name}, {line}")

    # --- undisturbed -------------------------------------------------------------------------------------------------

    def _make_reference(self) -> ReferenceRun:
        first, second = (self._run_undisturbed(f"undisturbed_{number}") for number in (1, 2))
        if problems := compare.checkpoint_differences(first.folder, second.folder):
            raise UnusableTraining(
                f"{self.training.name}: two undisturbed runs differ ({problems[0]}), so disturbed runs can't be "
                "compared with them; runtime.threads=1, a trainer.memory_format other than auto, or "
                "trainer.deterministic=true may help"
            )
        self._print(f"undisturbed: {first.steps} steps, two equal runs; first step after {first.startup_seconds:.1f} s")
        return first

    def _run_undisturbed(self, name: str) -> ReferenceRun:
        folder = self.folder / name
        startup_seconds = None
        with Attempt(self.launcher, self.training.keys, folder, self._output_file(name)) as attempt:
            last_progress, step = time.monotonic(), None
            while not attempt.has_ended():
                if (newest := attempt.newest_step()) != step:
                    last_progress, step = time.monotonic(), newest
                    startup_seconds = startup_seconds or time.monotonic() - attempt.started
                if time.monotonic() - last_progress > self.patience_seconds:
                    raise self._unusable(f"logged nothing for {self.patience_seconds:g} s")
                time.sleep(_POLL_SECONDS)
            total_seconds = time.monotonic() - attempt.started
            if any(attempt.exit_codes()):
                raise self._unusable(f"failed: {attempt.last_message()}")
            if startup_seconds is None:
                raise self._unusable("logged no step; trainer.log_every_steps must be smaller")
        steps = json.loads((folder / "summary.json").read_text())["steps"]
        size_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        return ReferenceRun(folder, steps, startup_seconds, (total_seconds - startup_seconds) / steps, size_bytes)

    def _unusable(self, reason: str) -> UnusableTraining:
        return UnusableTraining(f"{self.training.name}: the undisturbed run {reason}")

    def _output_file(self, name: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{name}.log"

    # --- disturbed ---------------------------------------------------------------------------------------------------

    def _run_disturbed(self, planned: PlannedRun, reference: ReferenceRun) -> list[Recovery]:
        folder = self.folder / f"run_{planned.number:03d}"
        correct = False
        with contextlib.ExitStack() as stack:
            launcher, network, disk = self.launcher, None, None
            if planned.needs_network:
                launcher, network = stack.enter_context(self.open_network())
            fills_disk = any(FAULT_KINDS[fault.kind].needs_disk for fault in planned.faults)
            if fills_disk:
                disk = make_disk(folder, max(_MIN_DISK_BYTES, _DISK_FACTOR * reference.size_bytes))
                stack.push(lambda *_: disk.remove(keep=self.keep or not correct))
            disturbed = DisturbedRun(
                self.training,
                planned.number,
                launcher,
                folder,
                self._output_file(folder.name),
                patience_seconds=self.patience_seconds,
                disk=disk,
                network=network,
                print_line=self.print_line,
            )
            recoveries = disturbed.recoveries
            try:
                problems = disturbed.run_to_completion(deque(planned.faults))
            finally:
                self.recoveries.extend(recoveries)
            problems = problems or compare.checkpoint_differences(reference.folder, folder)
            for recovery in recoveries:
                recovery.identical = not problems
            if recoveries and not problems:
                recoveries[-1].problems += compare.log_differences(reference.folder, folder, lossy=fills_disk)
            correct = all(recovery.recovered and recovery.identical for recovery in recoveries)
            all_problems = problems or [problem for recovery in recoveries for problem in recovery.problems]
            if problems and not recoveries:
                raise UnusableTraining(
                    f"{self.training.name}: run {planned.number}, into which no fault was injected: {problems[0]}"
                )
            outcome = "ended as the undisturbed run" if correct else f"ended WRONG: {all_problems[0]}"
            self._print(f"run {planned.number} {outcome}")
        if correct and not self.keep:
            shutil.rmtree(folder, ignore_errors=True)
        return recoveries
