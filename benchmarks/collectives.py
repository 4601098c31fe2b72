"""Collectives among ranks of one host: through memory that they share, beside gloo, in one run.

Both carriers serve the same processes, one thread a rank, and take turns, several rounds, so that a machine whose speed
drifts treats both alike. In a round each makes some calls after a warm-up, whose median is the slowest rank's; the
table gives the median over rounds in ms, and the ratio of the medians.

    python benchmarks/collectives.py [--ranks 2 4] [--bytes 4096 501760 47185920] [--rounds 9] [--json FILE]
        [--operations all_reduce start_all_reduce all_gather broadcast barrier]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distrain.collectives import Communicator
from distrain.shared_memory.meeting import channels

#: Calls of a round last about so long by gloo's first one, in seconds.
_ROUND_SECONDS = 0.1
_MOST_CALLS = 20

OPERATIONS: dict[str, Callable[[Communicator, Tensor], Any]] = {
    "all_reduce": lambda everyone, tensor: everyone.all_reduce(tensor),
    "start_all_reduce": lambda everyone, tensor: everyone.start_all_reduce(tensor).wait(),
    "all_gather": lambda everyone, tensor: everyone.all_gather(tensor),
    "broadcast": lambda everyone, tensor: everyone.broadcast(tensor),
    "barrier": lambda everyone, tensor: everyone.barrier(),
}


def communicators() -> dict[str, Communicator]:
    """One for each carrier, which has met its peers."""
    made: dict[str, Communicator] = {}
    for name, allowed in (("gloo", False), ("memory", True)):
        channels.allowed = allowed
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
    """Starts the ranks and prints their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--bytes", type=int, nargs="+", default=[4096, 490 << 10, 45 << 20])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print(f"{'ranks':>5} {'operation':16} {'bytes':>10} {'gloo ms':>9} {'memory ms':>9} {'ratio':>6}")
    everything: list[dict[str, Any]] = []
    start = multiprocessing.get_context("spawn").Process
    for ranks in arguments.ranks:
        with tempfile.TemporaryDirectory() as folder:
            processes = [start(target=work, args=(rank, ranks, folder, arguments)) for rank in range(ranks)]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
            if any(process.exitcode for process in processes):
                raise SystemExit("a rank failed")
            rows = json.loads(Path(folder, "rows.json").read_text())
        for row in rows:
            gloo, memory = (1000 * statistics.median(row[name]) for name in ("gloo", "memory"))
            place = f"{row['ranks']:5} {row['operation']:16} {row['bytes']:10}"
            print(f"{place} {gloo:9.3f} {memory:9.3f} {memory / gloo:6.3f}", flush=True)
        everything += rows
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(everything))


if __name__ == "__main__":
    main()
