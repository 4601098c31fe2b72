"""Compares collectives through shared memory with gloo, among the ranks of one host or of a few hosts.

Both are measured in the same processes, with one thread per rank, and take turns for several rounds, so that a machine
whose speed drifts affects both alike. A round's figure is the median over some calls after a warm-up, on the slowest
rank. The table gives the median over rounds in ms, and the ratio of the medians.

    python benchmarks/collectives.py [--ranks 2 4] [--bytes 4096 501760 47185920] [--rounds 9] [--json FILE]
        [--operations all_reduce start_all_reduce all_gather reduce_scatter broadcast barrier]
        [--hosts 2] [--link 1gbit]

With more than one host the ranks are divided among hosts of a test network (needs root), whose links have the rate
``--link``. Ranks of a host exchange tensors through memory, and one rank of each host over the network.
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

#: Approximate duration of a round in seconds, estimated from the first call by gloo.
_ROUND_SECONDS = 0.1
_MAX_CALLS = 20

OPERATIONS: dict[str, Callable[[Communicator, Tensor], Any]] = {
    "all_reduce": lambda communicator, tensor: communicator.all_reduce(tensor),
    "start_all_reduce": lambda communicator, tensor: communicator.start_all_reduce(tensor).wait(),
    "all_gather": lambda communicator, tensor: communicator.all_gather(tensor),
    "reduce_scatter": lambda communicator, tensor: communicator.reduce_scatter(
        tensor[: len(tensor) // communicator.size * communicator.size]
    ),
    "broadcast": lambda communicator, tensor: communicator.broadcast(tensor),
    "barrier": lambda communicator, tensor: communicator.barrier(),
}


def make_communicators() -> dict[str, Communicator]:
    """A connected communicator by gloo, and one by shared memory."""
    made: dict[str, Communicator] = {}
    for name, enabled in (("gloo", False), ("memory", True)):
        channel_registry.enabled = enabled
        made[name] = Communicator(dist.new_group(backend="gloo"))
        made[name].barrier()
    return made


def measure(
    communicators: dict[str, Communicator], call: Callable[[Communicator, Tensor], Any], size: int, rounds: int
) -> Any:
    """Seconds per call by gloo and by shared memory, one figure per round."""
    seconds: dict[str, list[float]] = {name: [] for name in communicators}
    tensor = torch.zeros(size // 4)
    start_time = time.perf_counter()
    call(communicators["gloo"], tensor)
    calls_per_round = _ROUND_SECONDS / (time.perf_counter() - start_time)
    agreed = torch.tensor(min(max(calls_per_round, 2), _MAX_CALLS), dtype=torch.float64)
    calls = int(communicators["gloo"].all_reduce(agreed, "min"))
    for _ in range(rounds):
        for name, communicator in communicators.items():
            call(communicator, tensor)
            communicators["gloo"].barrier()
            durations = []
            for _ in range(calls):
                start_time = time.perf_counter()
                call(communicator, tensor)
                durations.append(time.perf_counter() - start_time)
            slowest = torch.tensor(statistics.median(durations), dtype=torch.float64)
            seconds[name].append(float(communicators["gloo"].all_reduce(slowest, "max")))
    return seconds


def run_rank(rank: int, ranks: int, folder: str, arguments: argparse.Namespace) -> None:
    """Measures as one rank; rank 0 writes the results."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    communicators = make_communicators()
    rows = []
    for operation in arguments.operations:
        for size in arguments.bytes if operation != "barrier" else [0]:
            seconds = measure(communicators, OPERATIONS[operation], size, arguments.rounds)
            rows.append({"ranks": ranks, "operation": operation, "bytes": size, **seconds})
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def main() -> None:
    """Runs the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--bytes", type=int, nargs="+", default=[4096, 490 << 10, 45 << 20])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--link", help="rate at which a host sends, such as 1gbit")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        rank, ranks, folder = arguments.worker
        run_rank(int(rank), int(ranks), folder, arguments)
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
    """Runs all ranks and returns the measurements of rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(ranks):
            command = [sys.executable, __file__, *sys.argv[1:], "--worker", str(rank), str(ranks), folder]
            # All ranks share this machine's cores, whatever host they are on.
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
