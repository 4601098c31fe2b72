"""Environment variables of ranks that srun starts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from distrain.tools.launching import slurm

#: The fourth of five tasks, on two nodes.
TASK = {
    "SLURM_JOB_ID": "12345",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "3,2",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
}
SCONTROL = """#!/bin/sh
case "$1 $2" in
"show hostnames") echo n1; echo n2 ;;
"show node") echo "NodeName=$4 Arch=x86_64 NodeAddr=10.0.0.1 NodeHostName=$4" ;;
esac
"""


@pytest.fixture(autouse=True)
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def test_each_task_is_a_rank_and_the_first_node_is_the_master() -> None:
    environment = dict(TASK)
    slurm.set_torchrun_variables(environment)
    assert {name: environment[name] for name in environment if name not in TASK} == {
        "RANK": "3",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": str(20000 + (31 * 12345 + 2) % 10000),
    }


@pytest.mark.parametrize("changes", [{"RANK": "0"}, {"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_STEP_ID": None}], ids=str)
def test_ranks_of_torchrun_single_tasks_and_batch_scripts_are_left_alone(changes: dict[str, str | None]) -> None:
    environment = {name: value for name, value in {**TASK, **changes}.items() if value is not None}
    before = dict(environment)
    slurm.set_torchrun_variables(environment)
    assert environment == before


def test_short_form_of_tasks_per_node_is_expanded() -> None:
    assert slurm.parse_tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert slurm.parse_tasks_per_node("4") == [4]
