"""Ranks that ``srun`` starts without torchrun, as Hydra's submitit launcher does."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import MutableMapping

from distrain.runtime.world import World

#: First rendezvous port to choose from and how many; below the ports that systems use for outgoing connections.
_FIRST_PORT, _PORTS = 20000, 10000


def set_torchrun_variables(environment: MutableMapping[str, str]) -> None:
    """Sets the variables that torchrun would set, for a task of a SLURM step with several tasks.

    Each task becomes a rank, in SLURM's order. Does nothing for ranks that torchrun started, for the batch script and
    for a step with one task.

    Args:
        environment: The process's environment variables; changed in place.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environment or "SLURM_STEP_ID" not in environment or tasks == "1":
        return
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    tasks_of_nodes = parse_tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    environment.update(
        RANK=environment["SLURM_PROCID"],
        WORLD_SIZE=tasks,
        LOCAL_RANK=environment["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=str(tasks_of_nodes[int(environment["SLURM_NODEID"])]),
        MASTER_ADDR=_first_address(environment["SLURM_STEP_NODELIST"]),
        # Equal on all ranks of a step, and most likely different for another step.
        MASTER_PORT=str(_FIRST_PORT + (31 * job + step) % _PORTS),
    )


def world_of_process() -> World:
    """This rank's place, whoever started it: torchrun, SLURM, distrain's own launcher or nobody."""
    set_torchrun_variables(os.environ)
    return World.from_environment()


def parse_tasks_per_node(text: str) -> list[int]:
    """Expands SLURM's short form of the number of tasks of each node: ``2(x3),1`` is 2, 2, 2, 1."""
    tasks: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        assert match is not None, text
        tasks += [int(match[1])] * int(match[2] or 1)
    return tasks


def _first_address(nodes: str) -> str:
    first = _scontrol("show", "hostnames", nodes).splitlines()[0]
    # The address that SLURM itself uses, because a node's name need not resolve.
    match = re.search(r" NodeAddr=(\S+)", _scontrol("show", "node", "--oneliner", first))
    return match[1] if match else first


def _scontrol(*arguments: str) -> str:
    command = ["scontrol", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603
