"""Collectives among ranks of one host, or of a few: through memory that they share, beside gloo, in one run.

Both carriers serve the same processes, one thread a rank, and take turns, several rounds, so that a machine whose speed
drifts treats both alike. In a round each makes some calls after a warm-up, whose median is the slowest rank's; the
table gives the median over rounds in ms, and the ratio of the medians.

    python benchmarks/collectives.py [--ranks 2 4] [--bytes 4096 501760 47185920] [--rounds 9] [--json FILE]
        [--operations all_reduce start_all_reduce all_gather reduce_scatter broadcast barrier]
        [--hosts 2] [--link 1gbit]

With more than one host the ranks are shared out among hosts of a test network (needs root), in which a link sends no
more than ``--link``; those of a host exchange through memory, and one of them over the network.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distrain.communication.collectives import Communicator
from distrain.communication.shared_memory.connect import channel_registry
from distrain.tools.testnet import network

#: Calls of a round last about so long by gloo's first one, in seconds.
_ROUND_SECONDS = 0.1
_MOST_CALLS = 20

OPERATIONS: dict[str, Callable[[Communicator, Tensor], Any]] = {
    "all_reduce": lambda everyone, tensor: everyone.all_reduce(tensor),
    "start_all_reduce": lambda everyone, tensor: everyone.start_all_reduce(tensor).wait(),
    "all_gather": lambda everyone, tensor: everyone.all_gather(tensor),
    "reduce_scatter": lambda everyone, tensor: everyone.reduce_scatter(
        tensor[: len(tensor) // everyone.size * everyone.size]
    ),
    "broadcast": lambda everyone, tensor: everyone.broadcast(tensor),
    "barrier": lambda everyone, tensor: everyone.barrier(),
}


def communicators() -> dict[str, Communicator]:
    """One for each carrier, which has met its peers."""
    made: dict[str, Communicator] = {}
    for name, allowed in (("gloo", False), ("memory", True)):
        channel_registry.enabled = allowed
        made[name] = Communicator(dist.new_group(backend="gloo"))
        made[name].barrier()
    return made


def measure(
    carriers: dict[str, Communicator], call: Callable[[Communicator, Tensor], Any], size: int, rounds: int
) -> Any:
    """Each carrier's seconds a call, one figure a round."""
    found: dict[str, list[float]] = {name: [] for name in carriers}
    tensor = torch.zeros(size // 4)
    began = time.perf_counter()
    call(carriers["gloo"], tensor)
    wanted = _ROUND_SECONDS / (time.perf_counter() - began)
    enough = torch.tensor(min(max(wanted, 2), _MOST_CALLS), dtype=torch.float64)
    calls = int(carriers["gloo"].all_reduce(enough, "min"))
    for _ in range(rounds):
        for name, everyone in carriers.items():
            call(everyone, tensor)
            carriers["gloo"].barrier()
            taken = []
            for _ in range(calls):
                began = time.perf_counter()
                call(everyone, tensor)
                taken.append(time.perf_counter() - began)
            slowest = torch.tensor(statistics.median(taken), dtype=torch.float64)
            found[name].append(float(carriers["gloo"].all_reduce(slowest, "max")))
    return found


def work(rank: int, ranks: int, folder: str, arguments: argparse.Namespace) -> None:
    """One rank."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    carriers = communicators()
    rows = []
    for operation in arguments.operations:
        for size in arguments.bytes if operation != "barrier" else [0]:
            found = measure(carriers, OPERATIONS[operation], size, arguments.rounds)
            rows.append({"ranks": ranks, "operation": operation, "bytes": size, **found})
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--bytes", type=int, nargs="+", default=[4096, 490 << 10, 45 << 20])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--link", help="what a host sends at most, as 1gbit")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        rank, ranks, folder = arguments.worker
        work(int(rank), int(ranks), folder, arguments)
        return
    with network.VirtualNetwork(arguments.hosts) if arguments.hosts > 1 else contextlib.nullcontext() as net:
        if net is not None:
            net.set_rate(arguments.link)
        rows = [row for ranks in arguments.ranks for row in start(ranks, arguments.hosts, net)]
    print(f"{'ranks':>5} {'operation':16} {'bytes':>10} {'gloo ms':>9} {'memory ms':>9} {'ratio':>6}")
    for row in rows:
        gloo, memory = (1000 * statistics.median(row[name]) for name in ("gloo", "memory"))
        place = f"{row['ranks']:5} {row['operation']:16} {row['bytes']:10}"
        print(f"{place} {gloo:9.3f} {memory:9.3f} {memory / gloo:6.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def start(ranks: int, hosts: int, net: network.VirtualNetwork | None) -> list[dict[str, Any]]:
    """Runs all ranks, and returns what they measured."""
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(ranks):
            command = [sys.executable, __file__, *sys.argv[1:], "--worker", str(rank), str(ranks), folder]
            # All share this machine's processors, whatever host they are on.
            variables = {"LOCAL_WORLD_SIZE": str(ranks)}
            if net is None:
                processes.append(subprocess.Popen(command, env={**os.environ, **variables}))
            else:
                variables["GLOO_SOCKET_IFNAME"] = "eth0"
                log = Path(folder, f"log{rank}")
                processes.append(net.start(rank * hosts // ranks, command, variables, log))
        codes = [process.wait() for process in processes]
        if any(codes):
            logs = [path.read_text() for path in sorted(Path(folder).glob("log*"))]
            raise SystemExit("\n".join([*logs, "a rank failed"]))
        rows: list[dict[str, Any]] = json.loads(Path(folder, "rows.json").read_text())
    return rows


if __name__ == "__main__":
    main()
