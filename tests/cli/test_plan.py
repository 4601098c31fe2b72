"""``distrain plan``: what it refuses, and a plan on two ranks with a trial."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distrain.cli.plan import PlanSettings, check
from distrain.errors import ConfigError
from distrain.tools.launching.launch_keys import LaunchSettings
from distrain.tools.planning.plan_keys import STRATEGIES
from tests.harness import HANG_SECONDS
from tests.runs import SMALL


def settings(**keys: Any) -> PlanSettings:
    sizes = {"rows": 3, "check": 0, "most_hosts": 8, "gbit_per_s": None}
    return PlanSettings(**{"cluster": None, "strategies": list(STRATEGIES), "folder": None, **sizes, **keys})


@pytest.mark.parametrize(
    ("own", "keys", "launch", "line"),
    [
        ({}, ("nproc=2",), {}, "nproc: is a key of plan itself; write it before --, as in: distrain plan nproc=2 -- "),
        ({}, ("optimizer.l=1",), {}, r"optimizer\.l: no such key"),
        ({}, (), {"nproc": 2, "max_restarts": 1}, "measures ranks that stay"),
        ({"cluster": "none.yaml"}, (), {}, r"cluster=none\.yaml: can't be read"),
        ({"cluster": "none.yaml", "check": 1}, (), {}, "check=1: runs what is planned, and the ranks of cluster="),
        ({"strategies": []}, (), {}, r"strategies=\[\]: names none"),
    ],
)
def test_mistakes_are_refused_before_ranks_start(
    own: dict[str, Any], keys: tuple[str, ...], launch: dict[str, Any], line: str
) -> None:
    with pytest.raises(ConfigError, match=line):
        check(settings(**own), [*SMALL, *keys], LaunchSettings(**launch))


def test_a_described_cluster_needs_no_ranks(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    link = "{latency_us: 1, gbit_per_s: 1}"
    path.write_text(f"hosts: 2\nranks_per_host: 1\nwithin: {link}\nbetween: {link}\n")
    with pytest.raises(ConfigError, match="nproc: has no meaning with cluster="):
        check(settings(cluster=str(path)), SMALL, LaunchSettings(nproc=2))


def test_two_ranks_are_planned_and_one_configuration_is_tried(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "distrain", "plan", "nproc=2", "check=1", "rows=2", "strategies=[ddp,pipeline]"]
    keys = [*SMALL, "strategy=local_sgd", "compression=qsgd"]
    done = subprocess.run(
        [*command, f"folder={tmp_path}", "most_hosts=4", "--", *keys],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "fastest that trains what one process trains: strategy=" in done.stdout
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    assert (tmp_path / "timeline.png").stat().st_size > 10_000
    assert plan["cluster"]["hosts"] == 1
    assert plan["cluster"]["ranks_per_host"] == 2
    times = [prediction["step_ms"] for prediction in plan["predictions"]]
    assert times == sorted(times)
    assert min(times) > 0
    strategies = {prediction["keys"]["strategy"] for prediction in plan["predictions"]}
    assert strategies == {"ddp", "pipeline"}
    for prediction in plan["predictions"]:
        assert sum(prediction["parts_ms"].values()) == pytest.approx(prediction["step_ms"], abs=1e-3)
    # The fastest one, and ddp if that is another one.
    assert [trial["measured_ms"] > 0 for trial in plan["trials"]] in ([True], [True, True])
    assert not (tmp_path / "trials").exists()
    assert plan["remarks"] == []
