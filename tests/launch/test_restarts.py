"""Runs that torchrun restarts, also on fewer ranks, resume from their newest checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from tests.harness import HANG_SECONDS, run_ranks
from tests.runs import LAUNCH, SMALL, small, train_on_rank

OPTIONS = (*SMALL, "strategy=ddp", "model=custom", "trainer.epochs=100", "checkpoint.every_steps=5")
#: A node without a sign of life for six seconds counts as lost, and the rendezvous waits briefly for more nodes.
QUICK = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=6"


class CrashingModel(nn.Module):
    """A linear model that kills its second rank in the eighth step of the first attempt."""

    def __init__(self, in_channels: int, num_classes: int, image_size: tuple[int, int], seconds: float = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels * image_size[0] * image_size[1], num_classes)
        self._seconds = seconds
        self._steps = 0

    def forward(self, images: Tensor) -> Tensor:
        self._steps += self.training
        at = tuple(os.environ.get(name) for name in ("RANK", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_RESTART_COUNT"))
        if self._steps == 8 and at == ("1", "1", "0"):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self._seconds)
        logits: Tensor = self.linear(images.flatten(1))
        return logits


def model(*arguments: str) -> tuple[str, ...]:
    return ("model._target_=tests.launch.test_restarts.CrashingModel", *arguments)


def launch(folder: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """Starts an agent, which starts its workers; their output goes to a file."""
    environment = {**os.environ, "PYTHONPATH": str(LAUNCH.parent), "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", *arguments]
    with (folder / "output").open("a") as output:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output, text=True)


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in logged if row["kind"] == kind]


def test_restarted_run_resumes_in_the_folder_of_its_first_attempt(tmp_path: Path) -> None:
    # Steps are so short that a checkpoint written in the background would not be complete when the rank is killed.
    options = (*OPTIONS, *model(), "trainer.max_steps=12", "trainer.log_every_steps=1", "checkpoint.background=false")
    process = launch(
        tmp_path, "--standalone", "--nproc-per-node=2", "--max-restarts=1", str(LAUNCH / "train.py"), *options
    )
    try:
        assert process.wait(timeout=HANG_SECONDS) == 0, (tmp_path / "output").read_text()
    finally:
        kill(process)
    (run,) = tmp_path.glob("outputs/*/*")
    assert "step_00000005: step 5, epoch 1" in (run / "logs" / "rank_0.log").read_text()
    assert [row["step"] for row in rows(run, "step")] == list(range(1, 13))
    assert [row["step"] for row in rows(run, "epoch")] == [5, 10]
    uninterrupted = run_ranks(train_on_rank, 2, small(*options, f"run_dir={tmp_path}/uninterrupted"))
    summary = json.loads((run / "summary.json").read_text())
    for key in ("steps", "samples", "train_loss", "test_loss"):
        assert summary[key] == uninterrupted[0]["summary"][key], key


# --- nodes that come and go ------------------------------------------------------------------------------------------


def kill(process: subprocess.Popen[str]) -> None:
    """Kills an agent and its workers at once, as a power failure of a node does."""
    workers = children(process.pid)
    process.kill()
    process.wait()
    for worker in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)


def children(parent: int) -> list[int]:
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                pids.append(int(stat.parent.name))
    return pids


class Nodes:
    """Agents on this machine that act as nodes of one job."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._folder, self._options = folder, options
        with socket.create_server(("127.0.0.1", 0)) as server:
            self._port = server.getsockname()[1]
        self._nodes: list[subprocess.Popen[str]] = []

    def join(self) -> subprocess.Popen[str]:
        node = launch(
            self._folder,
            "--nnodes=1:2",
            "--nproc-per-node=1",
            "--max-restarts=3",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint=127.0.0.1:{self._port}",
            "--rdzv-id=job",
            # The first node holds the rendezvous and is never killed.
            f"--rdzv-conf=is_host={int(not self._nodes)},{QUICK}",
            "--monitor-interval=0.1",
            "--local-addr=127.0.0.1",
            str(LAUNCH / "train.py"),
            *self._options,
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
        )
        self._nodes.append(node)
        return node

    def leave(self) -> None:
        for node in self._nodes:
            kill(node)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    options = (*OPTIONS, *model("+model.kwargs.seconds=0.02"), "trainer.epochs=100000", f"run_dir={tmp_path}/run")
    agents = Nodes(tmp_path, *options, "trainer.log_every_steps=5", "checkpoint.keep=3")
    yield agents
    agents.leave()


def wait_for(folder: Path, condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}\n" + (folder / "output").read_text()
        time.sleep(0.1)


@pytest.mark.soak
def test_job_continues_without_a_lost_node_and_accepts_it_again(nodes: Nodes, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def newest() -> str:
        return max((path.name for path in (run / "checkpoints").glob("step_*")), default="")

    def wait_until_training(ranks: int) -> None:
        """Waits until these ranks have resumed and saved."""

        def resumed() -> bool:
            text = (run / "logs" / "rank_0.log").read_text()
            return re.findall(r"this run \((.*)\) has:", text)[-1:] == [f"ddp on {ranks}"]

        wait_for(tmp_path, resumed, f"{ranks} ranks go on")
        before = newest()
        wait_for(tmp_path, lambda: newest() > before, f"{ranks} ranks save")

    nodes.join()
    second = nodes.join()
    wait_for(tmp_path, (run / "logs" / "rank_1.log").exists, "two ranks begin")
    before = newest()
    wait_for(tmp_path, lambda: newest() > before, "they save")
    kill(second)
    wait_until_training(1)
    nodes.join()
    wait_until_training(2)
    nodes.leave()
    steps = [row["step"] for row in rows(run, "step")]
    assert steps == list(range(5, steps[-1] + 1, 5))
    progress = json.loads(max((run / "checkpoints").glob("step_*/state.json")).read_text())["progress"]
    # The global batch size is unchanged: 48 samples an epoch, in steps of 10 and a last one of 8.
    assert progress["samples"] == 48 * (progress["step"] // 5) + 10 * (progress["step"] % 5)
