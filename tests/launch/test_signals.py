"""Signals to a training under the real torchrun: whoever gets them, the run saves and no process is left.

The tests of every run draw some cases; `pytest -m soak tests/launch/test_signals.py` tries them all.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import Tensor, nn

from distrain.health.process import Process, _state_and_start
from tests.harness import HANG_SECONDS
from tests.runs import LAUNCH

if sys.platform != "linux":
    pytest.skip("finds the ranks through /proc", allow_module_level=True)

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGKILL")
RECEIVERS = ("agent", "one rank", "all ranks", "agent and ranks")
PHASES = ("set-up", "training", "evaluation", "saving")
Case = tuple[str, str, str, int]


def possible(case: Case) -> bool:
    """Killed ranks can't save, torchrun takes no SIGUSR1, set-up ignores it; those are other tests' subjects."""
    name, receiver, phase, _ = case
    if name == "SIGUSR1":
        return "agent" not in receiver and phase != "set-up"
    return name != "SIGKILL" or receiver == "agent"


CASES: list[Case] = [case for case in itertools.product(SIGNALS, RECEIVERS, PHASES, (1, 2)) if possible(case)]
#: Always tried: Ctrl-C under torchrun once and twice, and an agent that is killed.
ALWAYS: list[Case] = [
    ("SIGINT", "agent", "training", 1),
    ("SIGINT", "agent", "training", 2),
    ("SIGKILL", "agent", "evaluation", 1),
]


class Slow(nn.Module):
    """Says in a file that an evaluation has begun, which takes a while."""

    def __init__(self, in_channels: int, num_classes: int, folder: str) -> None:
        super().__init__()
        self._folder = Path(folder)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 64, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        if not self.training and self._folder.joinpath("run", "metrics.jsonl").exists():
            self._folder.joinpath("evaluates").touch()
            time.sleep(0.05)
        scores: Tensor = self.layers(images)
        return scores


def wait_until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def children(pid: int) -> list[Process]:
    """The processes that a process started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = entry.joinpath("stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has ended
            if int(fields[1]) == pid:
                found.append(Process(int(entry.name), int(fields[19])))
    return sorted(found, key=lambda process: process.pid)


@pytest.fixture
def agent(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[bytes]]:
    """torchrun with two ranks, whose output goes to files of their own below ``output``."""
    often = ("checkpoint.every_steps=1",) if "saving" in request.node.name else ("checkpoint.every_epochs=1000000",)
    process = subprocess.Popen(
        [
            *(sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("--redirects", "3", "--log-dir", str(tmp_path / "output"), str(LAUNCH / "train.py")),
            *("strategy=ddp", "model=custom", "model._target_=tests.launch.test_signals.Slow"),
            f"+model.kwargs={{folder:'{tmp_path}'}}",
            *("data=synthetic", "data.height=8", "data.width=8", "data.train_size=53", "data.test_size=16"),
            *("data.batch_size=9", "logger=none", "trainer.epochs=1000000", "trainer.log_every_steps=1"),
            *("runtime.threads=1", f"run_dir={tmp_path / 'run'}", *often),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(LAUNCH.parent), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    yield process
    for rank in children(process.pid):
        rank.kill()
    process.kill()
    process.wait()


def try_case(case: Case, agent: subprocess.Popen[bytes], folder: Path) -> None:
    name, receiver, phase, count = case
    run = folder / "run"
    begun: dict[str, Callable[[], object]] = {
        "set-up": (run / "logs" / "rank_1.log").exists,
        "training": lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size,
        "evaluation": (folder / "evaluates").exists,
        "saving": lambda: list(run.glob("checkpoints/step_*")),
    }
    wait_until(lambda: begun[phase]() or agent.poll() is not None)
    ranks = children(agent.pid)
    assert len(ranks) == 2, "".join(file.read_text() for file in folder.glob("output/*/*/*/stderr.log"))
    itself = Process(agent.pid, _state_and_start(agent.pid)[1])
    receivers = {"agent": [itself], "one rank": ranks[1:], "all ranks": ranks, "agent and ranks": [itself, *ranks]}
    for _ in range(count):
        for process in receivers[receiver]:
            if process.is_alive:
                os.kill(process.pid, getattr(signal, name))
        # So that the second one is not merged with the first, which may still be pending.
        time.sleep(0.4 if count == 2 else 0)
    agent.wait(HANG_SECONDS)
    wait_until(lambda: not any(rank.is_alive for rank in ranks))
    stopped, failed = run / "stopped.json", run / "failure.json"
    printed = "".join(file.read_text() for file in folder.glob("output/*/*/*/stderr.log"))
    if phase != "set-up" and count == 1:
        content = json.loads(stopped.read_text())
        assert content["exit_code"] == 75
        assert (run / "checkpoints" / f"step_{content['step']:08d}" / "manifest.json").exists()
        assert not failed.exists()
        assert printed.count("saved; to go on: ") == 1
    assert stopped.exists() or failed.exists() or phase == "set-up"
    assert "Traceback" not in printed


@pytest.mark.parametrize("case", ALWAYS, ids=str)
def test_a_signal_saves_and_ends_a_run_and_leaves_no_process(
    case: Case, agent: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    try_case(case, agent, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_signal_in_every_phase(case: Case, agent: subprocess.Popen[bytes], tmp_path: Path) -> None:
    try_case(case, agent, tmp_path)
