"""Strategies on several hosts of a test network train the parameters of one host."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from distrain.tools.testnet.network import VirtualNetwork
from tests.harness import HANG_SECONDS, RankFailed, run_ranks, run_ranks_to_the_end, soaked
from tests.hosts import needs_network, on_host, run_on_hosts
from tests.runs import relative_difference, small, train_on_rank

pytestmark = needs_network

#: Plain SGD, because Adam's first steps divide noise by noise.
SGD = ("optimizer=sgd", "optimizer.lr=0.05", "trainer.max_steps=12", "trainer.precision=fp64", "model=simple_cnn")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The parameters that one process trains."""
    config = small(*SGD, f"run_dir={tmp_path_factory.mktemp('single')}")
    model: dict[str, Tensor] = run_ranks(train_on_rank, 1, config)[0]["model"]
    return model


def train(net: VirtualNetwork, folder: Any, *overrides: str) -> dict[str, Any]:
    """Trains on all hosts; returns the outcome of rank 0."""
    outcome: dict[str, Any] = run_on_hosts(net, train_on_rank, small(*SGD, f"run_dir={folder}", *overrides))[0]
    return outcome


#: Numbers of hosts and keys; the last ones make two replicas of two stages.
CASES = [
    (2, ("strategy=ddp",)),
    (4, ("strategy=ddp",)),
    (4, ("strategy=pipeline", "strategy.stages=2", "strategy.microbatches=2")),
]


@pytest.mark.parametrize("case", soaked(CASES, CASES[::2]), ids=str)
def test_hosts_train_the_parameters_of_one_process(
    case: tuple[int, tuple[str, ...]], reference: dict[str, Tensor], request: Any, tmp_path: Any
) -> None:
    hosts, keys = case
    net = request.getfixturevalue({2: "two_hosts", 4: "four_hosts"}[hosts])
    outcome = train(net, tmp_path, *keys)
    assert relative_difference(outcome["model"], reference) < 1e-12
    assert outcome["summary"]["world_size"] == hosts


@pytest.mark.parametrize(
    "keys",
    [("strategy=ddp", "compression=powersgd"), ("strategy=local_sgd", "strategy.sync_every=3")],
    ids=" ".join,
)
def test_hosts_train_the_parameters_of_as_many_ranks_on_one_host(
    keys: tuple[str, ...], two_hosts: VirtualNetwork, tmp_path: Any
) -> None:
    together = train(two_hosts, tmp_path / "hosts", *keys)
    config = small(*SGD, f"run_dir={tmp_path / 'one'}", *keys)
    alone = run_ranks(train_on_rank, 2, config)[0]
    assert relative_difference(together["model"], alone["model"]) < 1e-12
    assert together["summary"]["bytes_sent_per_step"] == alone["summary"]["bytes_sent_per_step"]


def test_power_failure_of_a_host_ends_the_job_within_the_time_limit(tmp_path: Path) -> None:
    keys = ("strategy=ddp", "trainer.max_steps=1000000", "trainer.epochs=1000000", "runtime.timeout_seconds=3")
    config = small("model=simple_cnn", *keys, f"run_dir={tmp_path}", "trainer.log_every_steps=1")
    with VirtualNetwork(2) as net:
        lost: list[float] = []

        def cut() -> None:
            metrics = tmp_path / "metrics.jsonl"
            deadline = time.monotonic() + HANG_SECONDS
            while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
                time.sleep(0.05)
            net.power_off(1)
            lost.append(time.monotonic())

        cutting = threading.Thread(target=cut)
        cutting.start()
        holders = [net.namespace_pid(host) for host in range(net.hosts)]
        remaining, powered_off = run_ranks_to_the_end(on_host, 2, holders, train_on_rank, (config,))
        ended = time.monotonic()
        cutting.join()
    assert isinstance(remaining, RankFailed)
    assert isinstance(powered_off, RankFailed)
    assert "died with exit code" in str(powered_off)
    # It fails by itself, or its watch ends it.
    assert "Failed" in str(remaining) or "exit code 1" in str(remaining)
    # A host that has lost power sends no sign of its end, so only the missing heartbeats show it.
    assert ended - lost[0] < 10
    assert json.loads((tmp_path / "failure.json").read_text())["error"]
