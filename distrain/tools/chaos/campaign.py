"""All runs of one training: undisturbed ones, and then hurt ones until enough faults have struck."""

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

from distrain.tools.chaos import compare, disk
from distrain.tools.chaos.disturbed import Disturbed, Recovery, Training
from distrain.tools.chaos.job import Job, Launcher
from distrain.tools.chaos.plan import KINDS, Run, draw_kinds, plan
from distrain.tools.testnet.network import VirtualNetwork

_POLL_SECONDS = 0.01
#: A small disk holds so many times what the undisturbed run left.
_DISK_FACTOR, _DISK_LEAST = 4, 16 << 20
#: Faults whose moments were missed are planned again so often.
_ROUNDS = 10


class Unusable(Exception):
    """The training can't be used to test recovery; the message says why."""


@dataclass(frozen=True)
class Undisturbed:
    """The run that all others are compared with.

    Attributes:
        folder: Its folder.
        steps: Its steps.
        start_seconds: From the start to the first logged step.
        step_seconds: Of a step after that, evaluation and saves included.
        size: Bytes that it left.
    """

    folder: Path
    steps: int
    start_seconds: float
    step_seconds: float
    size: int


@dataclass(frozen=True)
class Campaign:
    """All runs of one training.

    Attributes:
        training: What is hurt.
        launcher: Starts it.
        networked: Makes a network and the launcher that gives each rank a host of it.
        folder: Where runs go.
        patience_seconds: A run that logs nothing for so long is given up.
        keep: Keep the folders of runs that came out right too.
        say: Takes a line for the user.
        recoveries: Takes what came of each fault.
    """

    training: Training
    launcher: Launcher
    networked: Callable[[], AbstractContextManager[tuple[Launcher, VirtualNetwork]]]
    folder: Path
    patience_seconds: float
    keep: bool
    say: Callable[[str], None]
    recoveries: list[Recovery]

    def run(self, kinds: Sequence[str], count: int, per_run: int, seed: str) -> None:
        """Hurts the training ``count`` times; faults whose moment was missed are planned again.

        Raises:
            Unusable: Two undisturbed runs don't end, or not alike; or the runs are too short for the faults.
        """
        reference = self._undisturbed()
        number, left = 1, draw_kinds(kinds, count, f"{seed}/{self.training.name}")
        for _ in range(_ROUNDS):
            runs = plan(
                left,
                per_run=per_run,
                steps=reference.steps,
                world_size=self.training.world_size,
                start_seconds=reference.start_seconds,
                step_seconds=reference.step_seconds,
                seed=f"{seed}/{self.training.name}/{number}",
                first=number,
            )
            for planned in runs:
                self._tell(f"run {planned.number} is planned as {'; '.join(map(str, planned.faults))}")
                for each in self._disturbed(planned, reference):
                    left.remove(each.fault.kind)
            number += len(runs)
            if not left:
                return
        missed = f"{', '.join(left)} found no moment to strike; are the runs too short?"
        raise Unusable(f"{self.training.name}: {missed}")

    def _tell(self, line: str) -> None:
        self.say(f"{self.training.name}, {line}")

    # --- undisturbed -------------------------------------------------------------------------------------------------

    def _undisturbed(self) -> Undisturbed:
        first, again = (self._whole(f"undisturbed_{number}") for number in (1, 2))
        if problems := compare.differences(first.folder, again.folder):
            raise Unusable(
                f"{self.training.name}: two undisturbed runs are not alike ({problems[0]}), so a third tells nothing; "
                "runtime.threads=1, a trainer.memory_format other than auto, or trainer.deterministic=true may help"
            )
        self._tell(f"undisturbed: {first.steps} steps, twice alike; the first after {first.start_seconds:.1f} s")
        return first

    def _whole(self, name: str) -> Undisturbed:
        folder = self.folder / name
        start_seconds = None
        with Job(self.launcher, self.training.keys, folder, self._output(name)) as job:
            changed, step = time.monotonic(), None
            while not job.has_ended():
                if (newest := job.step()) != step:
                    changed, step = time.monotonic(), newest
                    start_seconds = start_seconds or time.time() - job.started
                if time.monotonic() - changed > self.patience_seconds:
                    raise self._unusable(f"logged nothing for {self.patience_seconds:g} s")
                time.sleep(_POLL_SECONDS)
            took = time.time() - job.started
            if any(job.codes()):
                raise self._unusable(f"failed: {job.last_words()}")
            if start_seconds is None:
                raise self._unusable("logged no step; trainer.log_every_steps must be smaller")
        steps = json.loads((folder / "summary.json").read_text())["steps"]
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        return Undisturbed(folder, steps, start_seconds, (took - start_seconds) / steps, size)

    def _unusable(self, why: str) -> Unusable:
        return Unusable(f"{self.training.name}: the undisturbed run {why}")

    def _output(self, name: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{name}.log"

    # --- disturbed ---------------------------------------------------------------------------------------------------

    def _disturbed(self, planned: Run, reference: Undisturbed) -> list[Recovery]:
        folder = self.folder / f"run_{planned.number:03d}"
        right = False
        with contextlib.ExitStack() as stack:
            launcher, network, filled = self.launcher, None, None
            if planned.on_network:
                launcher, network = stack.enter_context(self.networked())
            fills = any(KINDS[fault.kind].needs_disk for fault in planned.faults)
            if fills:
                filled = disk.make(folder, max(_DISK_LEAST, _DISK_FACTOR * reference.size))
                stack.push(lambda *_: filled.remove(keep=self.keep or not right))
            disturbed = Disturbed(
                self.training,
                planned.number,
                launcher,
                folder,
                self._output(folder.name),
                patience_seconds=self.patience_seconds,
                disk=filled,
                network=network,
                say=self.say,
            )
            found = disturbed.recoveries
            try:
                problems = disturbed.to_the_end(deque(planned.faults))
            finally:
                self.recoveries.extend(found)
            problems = problems or compare.differences(reference.folder, folder)
            for each in found:
                each.identical = not problems
            if found and not problems:
                found[-1].problems += compare.log_differences(reference.folder, folder, lossy=fills)
            right = all(each.recovered and each.identical for each in found)
            wrong = problems or [line for each in found for line in each.problems]
            if problems and not found:
                raise Unusable(f"{self.training.name}: run {planned.number}, which no fault struck: {problems[0]}")
            self._tell(f"run {planned.number} ended {'as the undisturbed one' if right else f'WRONG: {wrong[0]}'}")
        if right and not self.keep:
            shutil.rmtree(folder, ignore_errors=True)
        return found
