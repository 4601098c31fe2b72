"""Compares ``strategy=fsdp`` with ``strategy=ddp`` and with a bare loop around torch's ``fully_shard``.

Two ranks on this host train the same model with the same batches, in float32, with Adam and one thread per rank. The
contenders take turns in the same processes: some steps of each in every round. Prints the medians and the ratios.

    python -m benchmarks.fsdp [--rounds 7] [--steps 6] [--batch 32] [--model resnet18]
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from distrain.cli import hydra_entry as cli
from distrain.config import schema
from distrain.config.load import load_config
from distrain.data.base import data_source
from distrain.data.batch import Batch
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.training.assembly import build_model, build_trainer
from distrain.training.run_plan import RunPlan

ROOT = Path(__file__).parent.parent
RANKS = 2
OURS = {
    "ddp": ("strategy=ddp",),
    "fsdp optimizer": ("strategy=fsdp", "strategy.shard=optimizer"),
    "fsdp gradients": ("strategy=fsdp", "strategy.shard=gradients"),
    "fsdp full": ("strategy=fsdp", "strategy.shard=full"),
    "fsdp full, kept": ("strategy=fsdp", "strategy.shard=full", "strategy.reshard_after_forward=false"),
}


def configuration(arguments: argparse.Namespace, *strategy: str) -> schema.Config:
    """The configuration of a contender."""
    return load_config(
        cli.compose(
            ROOT / "conf",
            "config",
            [
                *strategy,
                f"model={arguments.model}",
                *(("model.norm=group",) if arguments.model.startswith("resnet") else ()),
                "optimizer=adam",
                "data=synthetic",
                "data.train_size=1024",
                "data.test_size=64",
                "data.val_fraction=0",
                f"data.batch_size={arguments.batch}",
                "trainer.memory_format=contiguous",
                "trainer.precision=fp32",
                "runtime.threads=1",
                f"run_dir={os.environ['BENCHMARK_FOLDER']}",
            ],
        )
    )


def fully_shard(model: nn.Module) -> Callable[[Batch], None]:
    """A step of a bare loop around ``fully_shard``, with each block of the model as a group."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard as shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.children():
        if any(True for _ in block.parameters()):
            shard(block, mesh=mesh)
    shard(model, mesh=mesh)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(batch: Batch) -> None:
        assert isinstance(batch.targets, torch.Tensor)
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(batch.inputs), batch.targets).backward()
        optimizer.step()

    return step


def rank(arguments: argparse.Namespace) -> None:
    """Runs one rank; rank 0 prints."""
    configurations = {name: configuration(arguments, *strategy) for name, strategy in OURS.items()}
    first, world = configurations["ddp"], World.from_environment()
    splits = data_source(first.data).load()
    with Runtime(first, world) as runtime:
        steps: dict[str, Callable[[Batch], object]] = {}
        for name, each in configurations.items():
            trainer = build_trainer(RunPlan.resolve(each, world), runtime, splits)
            steps[name] = trainer.strategy.train_step
        batches = itertools.cycle(list(trainer.loaders["train"].epoch(0)))
        model = build_model(RunPlan.resolve(first, world), splits).train()
        steps["fully_shard"] = fully_shard(model)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(arguments.rounds):
            for name, step in steps.items():
                for number in range(arguments.steps):
                    if number == 1:
                        # The first step of a turn finds the caches cold.
                        dist.barrier()
                        start = time.perf_counter()
                    step(next(batches))
                seconds[name].append((time.perf_counter() - start) / (arguments.steps - 1))
        if runtime.is_main:
            medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
            full = medians["fsdp full"]
            for name, median in medians.items():
                print(f"{name:16} {1000 * median:8.1f} ms a step, fsdp full is {median / full:.2f} times as fast")


def main() -> None:
    """Starts the ranks, or is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--model", default="resnet18")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        rank(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={RANKS}", "-m", "benchmarks.fsdp"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "BENCHMARK_FOLDER": f"{folder}/run"}
        subprocess.run([*command, *sys.argv[1:]], env=environment, cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
