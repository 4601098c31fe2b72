"""Many ordinary runs, none of which may crash or lose a heartbeat: faults that one run in a hundred shows."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distrain.config.schema import Config
from distrain.health import watch
from distrain.health.thread_stack import ThreadStack
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from tests.harness import run_ranks
from tests.runs import LAUNCH, small, trainer_for

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]

STEPS = 1500
#: Seconds between two looks at the main thread; a run without this test looks once a second.
WALK_SECONDS = 0.001


@pytest.fixture
def busy_process() -> Iterator[None]:
    """Another process that always wants a processor, as on a shared machine."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    yield
    process.kill()
    process.wait()


def walk(thread: int, ended: threading.Event, walks: list[int]) -> None:
    while not ended.wait(WALK_SECONDS):
        walks[0] += bool(ThreadStack.of_thread(thread).lines)


def train_while_walked(config: Config) -> dict[str, Any]:
    """Trains while the watch thread, and one more, look at the main thread every millisecond."""
    watch._INTERVAL_SECONDS = WALK_SECONDS
    ended, walks = threading.Event(), [0]
    walker = threading.Thread(target=walk, args=(threading.get_ident(), ended, walks))
    walker.start()
    with Runtime(config, World.from_environment()) as runtime:
        summary = trainer_for(config, runtime).fit()
    ended.set()
    walker.join()
    return {"steps": summary["steps"], "walks": walks[0]}


@pytest.mark.parametrize("run", range(10))
def test_run_that_is_looked_at_every_millisecond_loses_no_heartbeat(
    run: int, busy_process: None, tmp_path: Path
) -> None:
    options = ("strategy=ddp", "logger=tensorboard", "trainer.log_every_steps=5", "checkpoint.every_steps=100")
    long = (f"trainer.max_steps={STEPS}", "trainer.epochs=100000", f"seed={run}", f"run_dir={tmp_path}")
    for found in run_ranks(train_while_walked, 2, small(*options, *long), timeout=500):
        assert found["steps"] == STEPS
        assert found["walks"] > STEPS
    # A heartbeat that fails is logged.
    assert "watch thread" not in "".join(log.read_text() for log in (tmp_path / "logs").glob("*.log"))


@pytest.mark.parametrize("launch", range(300))
def test_ordinary_launch_ends_with_success(launch: int, tmp_path: Path) -> None:
    """The command of `make train`, for a few epochs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(LAUNCH / "train.py")]
    started = time.monotonic()
    result = subprocess.run(
        [*command, "strategy=ddp", "trainer.epochs=3", f"seed={launch}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(LAUNCH.parent)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert result.returncode == 0, f"after {time.monotonic() - started:.0f} s: {result.stdout}{result.stderr}"
    (run,) = tmp_path.glob("outputs/*/*")
    assert (run / "summary.json").exists()
    assert not (run / "failure.json").exists()
