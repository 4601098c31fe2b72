"""Whole jobs under torchrun on a test network. They take minutes, so they run by ``make test-net`` only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distrain.cli.run_folder import RunFolder
from tests.harness import run_ranks
from tests.hosts import needs_network
from tests.runs import LAUNCH, SMALL, relative_difference, small
from tests.trained import train

pytestmark = [
    needs_network,
    pytest.mark.skipif("DISTRAIN_TEST_NET" not in os.environ, reason="takes minutes; make test-net runs it"),
]

#: Time limit in seconds for a job of four hosts that share two cores.
PATIENCE = 110
KEYS = ("optimizer=sgd", "optimizer.lr=0.05", "trainer.max_steps=12", "trainer.precision=fp64", "model=simple_cnn")


def overrides(*keys: str) -> list[str]:
    """Command-line keys of a small run with longer time limits."""
    untimed_keys = [key for key in SMALL if "timeout" not in key]
    return [*untimed_keys, "runtime.timeout_seconds=60", "runtime.setup_timeout_seconds=60", *KEYS, *keys]


def on_hosts(hosts: int, *command: str, links: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Runs a command on each host, as ``launch/testnet.py`` does."""
    return subprocess.run(
        [sys.executable, str(LAUNCH / "testnet.py"), f"hosts={hosts}", *links, "--", *command],
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(LAUNCH.parent)},
    )


def torchrun(script: str, *keys: str, nodes: int, ranks: int = 1) -> list[str]:
    options = ["--nnodes", str(nodes), "--nproc-per-node", str(ranks)]
    return [sys.executable, "-m", "torch.distributed.run", *options, str(LAUNCH / f"{script}.py"), *keys]


def weights(run: Path) -> dict[str, Tensor]:
    """The model of a run's newest checkpoint."""
    return dict(RunFolder.open(str(run)).weights("newest").tensors)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The parameters that one process on one host trains."""
    folder = tmp_path_factory.mktemp("single")
    run_ranks(train, 1, small(*KEYS, f"run_dir={folder}"))
    return weights(folder)


@pytest.mark.timeout(PATIENCE + 10)
@pytest.mark.parametrize(
    ("hosts", "ranks", "strategy"),
    [
        (4, 1, ("strategy=ddp",)),
        (4, 1, ("strategy=pipeline", "strategy.stages=2", "strategy.microbatches=2")),
        (2, 1, ("strategy=ddp",)),
        # Each host's ranks share its memory.
        (2, 2, ("strategy=ddp",)),
    ],
)
def test_torchrun_on_hosts_trains_the_parameters_of_one_process(
    hosts: int, ranks: int, strategy: tuple[str, ...], reference: dict[str, Tensor], tmp_path: Path
) -> None:
    keys = overrides(*strategy, f"run_dir={tmp_path}")
    done = on_hosts(hosts, *torchrun("train", *keys, nodes=hosts, ranks=ranks))
    assert done.returncode == 0, done.stdout[-3000:]
    assert relative_difference(weights(tmp_path), reference) < 1e-12
    summary: dict[str, Any] = json.loads((tmp_path / "summary.json").read_text())
    assert summary["world_size"] == hosts * ranks
    # Rank 0 is on host 0.
    assert "host0 | epoch" in done.stdout or "host0 | test_accuracy" in done.stdout


@pytest.mark.timeout(PATIENCE + 10)
@pytest.mark.parametrize(
    "strategy",
    [("strategy=ddp", "compression=powersgd"), ("strategy=local_sgd", "strategy.sync_every=3")],
    ids=" ".join,
)
def test_slow_and_lossy_links_change_no_parameter(strategy: tuple[str, ...], tmp_path: Path) -> None:
    links = ("rate=50mbit", "delay=2ms", "loss=0.1%")
    command = torchrun("train", *overrides(*strategy, f"run_dir={tmp_path / 'hosts'}"), nodes=2)
    done = on_hosts(2, *command, links=links)
    assert done.returncode == 0, done.stdout[-3000:]
    run_ranks(train, 2, small(*KEYS, *strategy, f"run_dir={tmp_path / 'one'}"))
    assert relative_difference(weights(tmp_path / "hosts"), weights(tmp_path / "one")) < 1e-12


@pytest.mark.timeout(PATIENCE + 10)
def test_doctor_under_torchrun_finds_a_slow_network(tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    command = torchrun("doctor", f"output={output}", nodes=2)
    done = on_hosts(2, *command, links=("rate=10mbit", "delay=5ms"))
    assert done.returncode == 1
    report = json.loads(output.read_text())
    assert [finding["kind"] for finding in report["findings"] if finding["wrong"]] == ["slow link"]
    (pair,) = [pair for pair in report["pairs"] if pair["sent"] is not None]
    assert 0.010 <= pair["latency"] < 0.020
    assert pair["sent"] * 8 == pytest.approx(10e6, rel=0.15)
    assert report["all_reduce"][0]["points"]
    assert torch.__version__ == report["ranks"][1]["versions"]["torch"]
