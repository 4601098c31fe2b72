"""Ranks that ``srun`` starts by itself, without a torchrun: what Hydra's submitit launcher does."""

from __future__ import annotations

import re
import subprocess
from collections.abc import MutableMapping

#: Below the ports that systems hand out for outgoing connections.
_FIRST_PORT, _PORTS = 20000, 10000


def adopt(environment: MutableMapping[str, str]) -> None:
    """Gives a task of a SLURM step with several tasks the variables that torchrun would set.

    Each task is a rank, in SLURM's order. torchrun's own ranks, the batch script and a step of one task are left as
    they are.

    Args:
        environment: The process's variables; changed.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environment or "SLURM_STEP_ID" not in environment or tasks == "1":
        return
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    per_node = counts(environment["SLURM_STEP_TASKS_PER_NODE"])
    environment.update(
        RANK=environment["SLURM_PROCID"],
        WORLD_SIZE=tasks,
        LOCAL_RANK=environment["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=str(per_node[int(environment["SLURM_NODEID"])]),
        MASTER_ADDR=_first_address(environment["SLURM_STEP_NODELIST"]),
        # The same for all ranks of a step, and most likely another for another step.
        MASTER_PORT=str(_FIRST_PORT + (31 * job + step) % _PORTS),
    )


def counts(text: str) -> list[int]:
    """Tasks of each node from SLURM's short form: ``2(x3),1`` is 2, 2, 2, 1."""
    found: list[int] = []
    for part in text.split(","):
        matched = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        assert matched is not None, text
        found += [int(matched[1])] * int(matched[2] or 1)
    return found


def _first_address(nodes: str) -> str:
    first = _scontrol("show", "hostnames", nodes).splitlines()[0]
    # The address that SLURM itself uses: the name of a node need not resolve.
    matched = re.search(r" NodeAddr=(\S+)", _scontrol("show", "node", "--oneliner", first))
    return matched[1] if matched else first


def _scontrol(*arguments: str) -> str:
    command = ["scontrol", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603
