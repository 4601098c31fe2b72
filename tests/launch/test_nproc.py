"""``distrain train nproc=2`` as its user types it: the ranks' end is the command's, and its last line says why."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from benchmarks.mistakes import MISTAKES
from distrain.checkpoint import weight_files
from tests.harness import HANG_SECONDS, soaked
from tests.launch.test_signals import children, wait_until
from tests.runs import LAUNCH, SMALL, relative_difference

if sys.platform != "linux":
    pytest.skip("finds the ranks through /proc", allow_module_level=True)

TRAIN = ("-m", "distrain", "train", "nproc=2", "strategy=ddp", *SMALL, "run_dir=run")


@contextmanager
def started(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": str(LAUNCH.parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        for rank in children(process.pid):
            rank.kill()
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("what", "code", "line"),
    [
        ("Ctrl-C", 75, "stopped by SIGINT at step "),
        ("a rank is killed", 137, "distrain: rank 1 on "),
    ],
)
def test_the_end_of_the_ranks_is_the_end_of_the_command(what: str, code: int, line: str, tmp_path: Path) -> None:
    keys = ("trainer.epochs=1000000", "trainer.log_every_steps=1", "trainer.progress=lines")
    with started(tmp_path, *TRAIN, *keys) as process:
        metrics = tmp_path / "run" / "metrics.jsonl"
        wait_until(lambda: (metrics.exists() and metrics.stat().st_size) or process.poll() is not None)
        ranks = children(process.pid)
        assert len(ranks) == 2
        if what == "Ctrl-C":
            process.send_signal(signal.SIGINT)
        else:
            ranks[1].kill()
        printed = process.communicate(timeout=HANG_SECONDS)[0]
        assert process.returncode == code, printed
        assert printed.splitlines()[-1].startswith(line)
        assert printed.count(line) == 1
        assert "Traceback" not in printed
        wait_until(lambda: not any(rank.is_alive for rank in ranks))
    if code == 75:
        # What is to be typed to go on starts ranks again.
        assert "-m distrain train nproc=2 strategy=ddp" in printed
        assert json.loads((tmp_path / "run" / "stopped.json").read_text())["exit_code"] == 75


@pytest.mark.soak
def test_a_run_that_is_restarted_ends_well_and_its_configuration_knows_no_ranks(tmp_path: Path) -> None:
    model = ("model=custom", "model._target_=tests.launch.test_restarts.CrashingModel")
    checkpoints = ("checkpoint.every_steps=5", "checkpoint.background=false")
    with started(tmp_path, *TRAIN, *model, *checkpoints, "max_restarts=1", "trainer.max_steps=12") as process:
        printed = process.communicate(timeout=HANG_SECONDS)[0]
    assert process.returncode == 0, printed
    assert printed.count("restart 1 of at most 1") == 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["resumed_at_step"]) == (12, 5)
    assert not {"nproc", "max_restarts"} & set((tmp_path / "run" / "config.yaml").read_text().replace(":", " ").split())


#: Tried in the suite; the others take minutes together.
TRIED = ("data.batch_size=1",)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a mistake on a machine without a GPU is none with two")
@pytest.mark.parametrize(
    "mistake",
    # Ranks of torchrun may train several jobs, one after the other.
    soaked((mistake for mistake in MISTAKES if "--multirun" not in mistake), TRIED),
)
def test_torchruns_last_ten_lines_name_the_mistake(mistake: str, tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    words = mistake.split()
    strategy = () if words[0].startswith("strategy=") else ("strategy=ddp",)
    with started(tmp_path, *launcher, str(LAUNCH / "train.py"), *strategy, *words) as process:
        printed = process.communicate(timeout=HANG_SECONDS)[0]
    assert process.returncode == 1
    assert MISTAKES[mistake] in "\n".join(printed.splitlines()[-10:])


# Both are the host of the meeting point here, and on a busy machine torch's store may refuse the second.
@pytest.mark.soak
def test_two_commands_that_meet_train_what_one_command_trains(tmp_path: Path) -> None:
    """``nnodes=2``, of two hosts that are one here."""
    short = ("trainer.max_steps=5", "trainer.precision=fp64")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    meeting = ("nproc=1", "nnodes=2", f"rdzv_endpoint=127.0.0.1:{port}", f"rdzv_id={tmp_path.name}")
    command = ("-m", "distrain", "train", *meeting, "strategy=ddp", *SMALL, *short, "run_dir=hosts")
    with started(tmp_path, *command) as first, started(tmp_path, *command) as second:
        for process in (first, second):
            printed = process.communicate(timeout=HANG_SECONDS)[0]
            assert process.returncode == 0, printed
    with started(tmp_path, *TRAIN, *short) as process:
        printed = process.communicate(timeout=HANG_SECONDS)[0]
        assert process.returncode == 0, printed
    whole, hosts = (weight_files.read(tmp_path / run) for run in ("run", "hosts"))
    assert relative_difference(hosts, whole) <= 1e-12
    summary = json.loads((tmp_path / "hosts" / "summary.json").read_text())
    assert (summary["steps"], summary["world_size"]) == (5, 2)
