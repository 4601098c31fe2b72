"""Compares the peak memory that ``distrain plan`` predicts with what torch allocates for a training.

A plan is made for each model on ranks of this machine; then its configurations are trained for some steps while torch's
profiler notes each allocation. The data set is not counted, as in a plan. Prints a row for each configuration: bytes of
the rank that needs most, predicted and allocated.

    python benchmarks/plan_memory.py [--models simple_cnn cifar_cnn resnet18] [--ranks 2] [--folder plans]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distrain.cli import app
from distrain.cli.training_keys import compose_training
from distrain.data.base import Splits

#: Keys of the models' trainings; synthetic images, so that no data set is needed.
KEYS = {
    "simple_cnn": ["model=simple_cnn", "data=digits", "data.batch_size=64"],
    "cifar_cnn": ["model=cifar_cnn", "data=synthetic", "data.height=32", "data.width=32", "data.batch_size=64"],
    "resnet18": ["model=resnet18", "data=synthetic", "data.height=64", "data.width=64", "data.batch_size=32"],
}
COMMON = ["runtime.threads=1", "optimizer=adamw"]
#: What is compared, as far as the plan has it.
CHOSEN = [
    {"strategy": "ddp"},
    {"strategy": "ddp", "compression": "powersgd"},
    {"strategy": "local_sgd", "strategy.sync_every": "4"},
    {"strategy": "parameter_server", "strategy.servers": "1"},
    *(
        {"strategy": "pipeline", "strategy.schedule": schedule, "strategy.microbatches": microbatches}
        for schedule in ("gpipe", "1f1b")
        for microbatches in ("2", "8")
    ),
]
#: Steps that are trained: the optimizer's state exists from the second one on, and merges happen.
STEPS = 8
#: The error that plans should keep.
LIMIT = 0.1
#: Where a rank of a training writes what it allocated.
_RESULT = "PLAN_MEMORY_RESULT"


def main() -> None:
    """Makes the plans, trains, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(KEYS), choices=KEYS)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("plans"))
    arguments = parser.parse_args()
    errors = []
    for model in arguments.models:
        keys = [*COMMON, *KEYS[model]]
        folder = (arguments.folder / model).resolve()
        asked = [f"nproc={arguments.ranks}", f"folder={folder}", "most_hosts=1", "--", *keys]
        command = [sys.executable, "-m", "distrain", "plan", *asked]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        plan = json.loads((folder / "plan.json").read_text())
        print(f"# {model}, {arguments.ranks} ranks", flush=True)
        for chosen in CHOSEN:
            found = next((one for one in plan["predictions"] if chosen.items() <= one["keys"].items()), None)
            if found is None:
                continue
            own = [f"{key}={value}" for key, value in found["keys"].items()]
            allocated = trained([*keys, *own], arguments.ranks, folder / "memory")
            predicted = found["memory_bytes"]["total"]
            errors.append(predicted / allocated - 1)
            line = f"{predicted / 1e6:8.2f} MB {allocated / 1e6:8.2f} MB  {errors[-1]:+7.1%}  {' '.join(own)}"
            print(line, flush=True)
    within = sum(abs(error) <= LIMIT for error in errors) / len(errors)
    print(f"{len(errors)} configurations: mean error {statistics.mean(map(abs, errors)):.1%}, {within:.0%} within 10%")


def trained(keys: Sequence[str], ranks: int, folder: Path) -> int:
    """Trains some steps; returns the bytes of the rank that allocated most."""
    folder.mkdir(exist_ok=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command = [*torchrun, __file__, *keys, f"trainer.max_steps={STEPS}"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, _RESULT: str(folder)})
    return max(int((folder / f"{rank}.txt").read_text()) for rank in range(ranks))


def train(keys: Sequence[str], folder: Path) -> None:
    """Trains as one of the ranks, and writes down what it allocated at most."""
    with app.prepared(compose_training(keys)) as trainer:
        before = held_bytes(trainer.splits)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            trainer.fit()
    trace = folder / f"trace_{trainer.runtime.world.rank}.json"
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    allocated = [event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]"]
    (folder / f"{trainer.runtime.world.rank}.txt").write_text(str(before + max(allocated, default=0)))


def held_bytes(splits: Splits) -> int:
    """Bytes of all tensors of this process but the data set."""
    excluded = {
        tensor.untyped_storage().data_ptr()
        for split in (splits.train, splits.val, splits.test)
        for tensor in tensors_of(split)
    }
    gc.collect()
    held = {}
    for item in gc.get_objects():
        if isinstance(item, Tensor) and item.device.type == "cpu":
            storage = item.untyped_storage()
            if storage.data_ptr() not in excluded:
                held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


def tensors_of(split: Any) -> Iterator[Tensor]:
    """The tensors that a split holds."""
    for value in vars(split).values():
        if isinstance(value, Tensor):
            yield value


if __name__ == "__main__":
    if result := os.environ.get(_RESULT):
        train(sys.argv[1:], Path(result))
    else:
        main()
