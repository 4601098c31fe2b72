"""``launch/train.py`` as users start it: alone and under the real torchrun, finished, stopped, resumed and refused."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from distrain.config.load import load_config, to_container
from distrain.errors import EXIT_STOPPED
from distrain.health.run_status import RunStatus
from tests.harness import HANG_SECONDS, run_ranks
from tests.runs import LAUNCH, compose, train_on_rank

SMALL = (
    "data=synthetic",
    "data.height=8",
    "data.width=8",
    "data.train_size=53",
    "data.test_size=31",
    "data.batch_size=9",
    "data.augment.flip=true",
    "optimizer.lr=0.01",
    # Its schedule does not depend on trainer.max_steps, so a shorter run equals the beginning of a longer one.
    "scheduler=step",
    "scheduler.milestones=[1.0]",
    "trainer.epochs=3",
    "trainer.log_every_steps=2",
    "runtime.threads=1",
    # Fixed, because the choice by measured times could differ between runs that are compared bit for bit.
    "trainer.memory_format=channels_last",
)
SUMMARY = {
    "strategy",
    "world_size",
    "mesh",
    "compression",
    "epochs",
    "steps",
    "samples",
    "train_loss",
    "val_accuracy",
    "test_accuracy",
    "test_loss",
    "images_per_second",
    "step_ms",
    "time_share",
    "bytes_sent_per_step",
    "bytes_uncompressed_per_step",
    "peak_memory_mb",
    "wall_seconds",
}
STRATEGIES = {"single": 1, "ddp": 2}


@dataclass
class FinishedCommand:
    """A finished command: its exit code and output."""

    code: int
    out: str
    err: str


def command(ranks: int, *arguments: str) -> list[str]:
    start = [sys.executable, "-W", "ignore"]
    if ranks > 1:
        # The system chooses the port, so that tests can run in parallel.
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*start, str(LAUNCH / "train.py"), *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(LAUNCH.parent), "OMP_NUM_THREADS": "1"}


def start(folder: Path, ranks: int, *arguments: str) -> FinishedCommand:
    done = subprocess.run(
        command(ranks, *arguments),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    return FinishedCommand(done.returncode, done.stdout, done.stderr)


def options(strategy: str, run: Path, steps: int) -> tuple[str, ...]:
    return (f"strategy={strategy}", *SMALL, f"run_dir={run}", f"trainer.max_steps={steps}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs below ``<strategy>/``: ``whole`` trains 10 steps; ``parts`` trains 5, is resumed and trains 5 more.

    Neither 5 nor 10 ends an epoch.
    """
    folder = tmp_path_factory.mktemp("runs")

    def whole(strategy: str) -> None:
        ended = start(folder, STRATEGIES[strategy], *options(strategy, folder / strategy / "whole", 10))
        assert ended.code == 0, ended.err

    def parts(strategy: str) -> None:
        run = folder / strategy / "parts"
        for steps in (5, 10):
            run_ranks(train_on_rank, STRATEGIES[strategy], compose(*options(strategy, run, steps), "logger=none"))
        assert "step_00000005: step 5, epoch 0" in run.joinpath("logs", "rank_0.log").read_text()

    for strategy in STRATEGIES:
        parts(strategy)
        whole(strategy)
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tensors(checkpoint: Path, part: str) -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = load_file(checkpoint / f"{part}.safetensors")
    return loaded


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_run_folder_has_the_documented_files(strategy: str, runs: Path) -> None:
    folder, ranks = runs / strategy / "whole", STRATEGIES[strategy]
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml",
        "data.json",
        "metrics.jsonl",
        "status.json",
        "summary.json",
        "tensorboard",
        "checkpoints",
        "logs",
    }
    assert {path.name for path in folder.joinpath("logs").iterdir()} == {f"rank_{rank}.log" for rank in range(ranks)}
    assert len(list(folder.joinpath("tensorboard").rglob("*tfevents*"))) == 1
    assert folder.joinpath("checkpoints", "step_00000010").is_dir()
    assert set(json.loads(folder.joinpath("data.json").read_text())) >= {"channels", "height", "width", "classes"}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_status_says_where_each_rank_was_last(strategy: str, runs: Path) -> None:
    status = RunStatus.from_json(json.loads((runs / strategy / "whole" / "status.json").read_text()))
    assert not status.running
    assert (status.step, status.total_steps) == (10, 10)
    assert [rank.rank for rank in status.ranks] == list(range(STRATEGIES[strategy]))
    assert "train/loss" in status.values


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_summary_has_the_results_of_the_run(strategy: str, runs: Path) -> None:
    summary = json.loads((runs / strategy / "whole" / "summary.json").read_text())
    assert set(summary) >= SUMMARY
    # 48 images an epoch in 5 batches of 9 and one of 3: the tenth step is the second epoch's fourth.
    assert (summary["strategy"], summary["world_size"]) == (strategy, STRATEGIES[strategy])
    assert (summary["epochs"], summary["steps"], summary["samples"]) == (1, 10, 48 + 4 * 9)
    assert summary["test_count"] == 31
    assert summary["test_accuracy"] == summary["test_correct"] / 31
    assert set(summary["step_ms"]) == {"mean", "p50", "p95"}
    assert set(summary["time_share"]) == {"compute", "communication", "data", "other"}
    assert sum(summary["time_share"].values()) == pytest.approx(1, abs=1e-6)
    assert (summary["bytes_sent_per_step"] > 0) == (strategy == "ddp")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_metrics_have_one_line_per_logged_step_and_epoch(strategy: str, runs: Path) -> None:
    rows = lines(runs / strategy / "whole" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "step"] == [2, 4, 6, 8, 10]
    assert [row["step"] for row in rows if row["kind"] == "epoch"] == [6]
    assert all(row["train/loss"] > 0 for row in rows if row["kind"] == "step")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_written_configuration_can_be_loaded_again(strategy: str, runs: Path) -> None:
    written = yaml.safe_load((runs / strategy / "whole" / "config.yaml").read_text())
    loaded = load_config(written)
    assert to_container(loaded) == written
    assert (loaded.strategy.name, loaded.optimizer.lr, loaded.trainer.max_steps) == (strategy, 0.01, 10)


@pytest.mark.parametrize("part", ["model", "optimizer"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resumed_run_is_equal_bit_for_bit(strategy: str, part: str, runs: Path) -> None:
    whole, parts = (
        tensors(runs / strategy / run / "checkpoints" / "step_00000010", part) for run in ("whole", "parts")
    )
    assert whole.keys() == parts.keys()
    assert whole
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resumed_run_has_the_same_metrics(strategy: str, runs: Path) -> None:
    whole, parts = (json.loads((runs / strategy / run / "summary.json").read_text()) for run in ("whole", "parts"))
    for key in ("epochs", "steps", "samples", "train_loss", "val_accuracy", "test_correct", "test_loss"):
        assert parts[key] == whole[key], key


def test_both_strategies_trained_the_same_model(runs: Path) -> None:
    single, ddp = (
        tensors(runs / strategy / "whole" / "checkpoints" / "step_00000010", "model") for strategy in STRATEGIES
    )
    for name, tensor in single.items():
        torch.testing.assert_close(ddp[name], tensor, rtol=1e-3, atol=1e-4)


def test_wrong_settings_under_torchrun_are_one_line_and_exit_code_2(tmp_path: Path) -> None:
    errors = {
        "optimizer.lrr=0.1": "distrain: optimizer.lrr: no such key; choices: ",
        "data.batch_size=1": "distrain: data.batch_size=1: the global batch is smaller than the 2 ranks that share it",
    }
    with ThreadPoolExecutor(2) as pool:
        endings = list(pool.map(lambda argument: start(tmp_path, 2, "strategy=ddp", argument), errors))
    for ended, expected in zip(endings, errors.values(), strict=True):
        own_lines = [line for line in ended.err.splitlines() if line.startswith("distrain:")]
        # The second rank waits to be ended by torchrun, and prints the same line if that takes long.
        assert len({*own_lines}) == 1, ended.err
        assert own_lines[0].startswith(expected)
        # torchrun's own exit code is 1; its report has the rank's exit code and torchrun's traceback.
        assert re.search(r"Root Cause[\s\S]*exitcode  : 2 ", ended.err)
        assert ended.err.count("Traceback (most recent call last)") == 1
        assert ended.out == ""
    assert list(tmp_path.iterdir()) == []


def test_run_stopped_by_sigterm_to_torchrun_resumes_bit_for_bit(tmp_path: Path) -> None:
    run = tmp_path / "run"

    def arguments(folder: Path, *more: str) -> tuple[str, ...]:
        return ("strategy=ddp", *SMALL, f"run_dir={folder}", "trainer.epochs=100000", "logger=none", *more)

    process = subprocess.Popen(
        command(2, *arguments(run)), cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + HANG_SECONDS
        while not run.joinpath("metrics.jsonl").exists() or not run.joinpath("metrics.jsonl").read_text():
            assert time.monotonic() < deadline, "the run never logged a step"
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, printed = process.communicate(timeout=HANG_SECONDS)
    finally:
        process.kill()
    stopped = json.loads(run.joinpath("stopped.json").read_text())
    step = stopped["step"]
    assert stopped == {"reason": "SIGTERM", "step": step, "exit_code": 75}
    assert step > 0
    (line,) = re.findall(f"stopped by SIGTERM at step {step}, saved; to go on: (.*)", printed)
    assert shlex.split(line)[-len(arguments(run)) :] == list(arguments(run))
    assert not run.joinpath("failure.json").exists()
    assert not run.joinpath("summary.json").exists()
    limit = f"trainer.max_steps={step + 5}"
    for folder in (run, tmp_path / "whole"):
        run_ranks(train_on_rank, 2, compose(*arguments(folder, limit)))
    assert not run.joinpath("stopped.json").exists()
    for part in ("model", "optimizer"):
        whole, parts = (
            tensors(folder / "checkpoints" / f"step_{step + 5:08d}", part) for folder in (tmp_path / "whole", run)
        )
        assert whole
        assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())


def test_stopped_run_exits_with_75_and_goes_on_with_the_command_that_it_prints(tmp_path: Path) -> None:
    ended = start(tmp_path, 1, *SMALL, "logger=none", "trainer.max_minutes=1e-9")
    assert ended.code == EXIT_STOPPED == 75
    line = ended.err.splitlines()[-1]
    assert line.startswith("stopped by trainer.max_minutes at step 1, saved; to go on: ")
    again = subprocess.run(
        line.partition("to go on: ")[2],
        shell=True,
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert again.returncode == EXIT_STOPPED
    assert again.stderr.splitlines()[-1].startswith("stopped by trainer.max_minutes at step 2, saved; to go on: ")
    assert len(list(tmp_path.glob("outputs/*/*"))) == 1
