"""If a host of an elastic job loses power, the other hosts continue and reach the parameters of an undisturbed run.

Takes half a minute, so it runs by ``make test-net`` only.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distrain.cli.run_folder import RunFolder
from distrain.tools.testnet.network import VirtualNetwork
from tests.harness import run_ranks
from tests.hosts import needs_network
from tests.runs import LAUNCH, SMALL, relative_difference, small
from tests.trained import train

pytestmark = [
    needs_network,
    pytest.mark.skipif("DISTRAIN_TEST_NET" not in os.environ, reason="takes long; make test-net runs it"),
]

STEPS = 300
#: Plain SGD, because Adam's first steps divide noise by noise.
KEYS = (
    *(key for key in SMALL if "timeout" not in key),
    *("model=simple_cnn", "optimizer=sgd", "optimizer.lr=0.05", "trainer.precision=fp64"),
    *("trainer.epochs=1000", f"trainer.max_steps={STEPS}", "trainer.log_every_steps=1", "checkpoint.every_steps=20"),
    *("runtime.timeout_seconds=60", "runtime.setup_timeout_seconds=60", "runtime.heartbeat_timeout_seconds=5"),
)
#: A host counts as lost after six seconds without a heartbeat, and the rendezvous waits at most 3 s for more hosts.
FAST_RENDEZVOUS = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=6"
#: Time limit in seconds for each part of the test, on a busy machine.
PATIENCE = 90


def start(net: VirtualNetwork, host: int, run: Path) -> subprocess.Popen[bytes]:
    """Starts the torchrun agent of a host as in ``docs/recovery.md``; the output of all hosts goes to one file."""
    return net.start(
        host,
        [
            *(sys.executable, "-W", "ignore", "-m", "torch.distributed.run"),
            *("--nnodes=2:3", "--nproc-per-node=1", "--max-restarts=3", "--monitor-interval=0.1"),
            f"--rdzv-conf=is_host={int(host == 0)},{FAST_RENDEZVOUS}",
            *(str(LAUNCH / "train.py"), *KEYS, "strategy=ddp", f"run_dir={run}"),
        ],
        {
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(LAUNCH.parent),
        },
        run.parent / "output",
    )


@contextlib.contextmanager
def started(net: VirtualNetwork, run: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    agents = [start(net, host, run) for host in range(net.hosts)]
    try:
        yield agents
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()


def wait_until(condition: Callable[[], object], what: str, output: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"timed out: {what}\n{output.read_text()[-3000:]}"
        time.sleep(0.02)


def newest(run: Path) -> Path | None:
    return max(run.glob("checkpoints/step_*"), default=None)


@pytest.mark.timeout(3 * PATIENCE)
@pytest.mark.parametrize("lost", [1, 2])
def test_remaining_hosts_reach_the_parameters_of_an_undisturbed_run(lost: int, tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "output"
    with VirtualNetwork(3) as net, started(net, run) as agents:
        wait_until((run / "logs" / "rank_2.log").exists, "three hosts begin", output)
        before = newest(run)
        wait_until(lambda: newest(run) != before, "they save", output)
        net.power_off(lost)
        assert not (run / "summary.json").exists(), "the run is too short to be disturbed"
        for host in {0, 1, 2} - {lost}:
            assert agents[host].wait(PATIENCE) == 0, output.read_text()[-3000:]

    # The two remaining hosts resumed from the newest checkpoint of three.
    log = (run / "logs" / "rank_0.log").read_text()
    assert re.findall(r"saved by (.*), this run \((.*)\) has:", log)[-1] == ("ddp on 3", "ddp on 2")
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    assert summary["world_size"] == 2

    run_ranks(train, 1, small(*KEYS, f"run_dir={tmp_path / 'alone'}"))
    undisturbed = json.loads((tmp_path / "alone" / "summary.json").read_text())
    # The global batch has not changed.
    for key in ("steps", "samples", "epochs", "test_correct"):
        assert summary[key] == undisturbed[key], key
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "step"] == list(range(1, STEPS + 1))
    ended, expected = (RunFolder.open(str(folder)).weights("newest") for folder in (run, tmp_path / "alone"))
    assert ended.step == STEPS
    assert relative_difference(ended.tensors, expected.tensors) < 1e-12
