"""Compares ``strategy=tensor_parallel`` with a bare loop around torch's ``parallelize_module`` (DTensor).

Two ranks on this host train the same vision transformer with the same batches, in float32, with Adam and one thread per
rank. The contenders take turns in the same processes: some steps of each in every round. Prints the medians and the
ratio. For ``parallelize_module``, queries, keys and values have a layer each, since it can't cut one layer between
heads; the gradient of their common input is summed over the ranks once.

    python -m benchmarks.tensor_parallel [--rounds 9] [--steps 8] [--batch 16] [--width 192] [--depth 6]
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
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from distrain.cli import hydra_entry as cli
from distrain.config import schema
from distrain.config.load import load_config
from distrain.data.base import data_source
from distrain.data.batch import Batch
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.training.assembly import build_trainer
from distrain.training.run_plan import RunPlan

ROOT = Path(__file__).parent.parent
RANKS, HEADS, SIDE, PATCH, CLASSES = 2, 6, 32, 4, 10


class JoinedAttention(nn.Module):
    """Self-attention with one layer for queries, keys and values."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps tokens ``[N, T, C]`` to tokens of the same shape."""
        samples, tokens, width = x.shape
        joined = self.qkv(x).reshape(samples, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*joined.unbind(0))
        output: Tensor = self.proj(attended.transpose(1, 2).reshape(samples, tokens, width))
        return output


class SeparateAttention(nn.Module):
    """The same with three layers, and with as many heads as there are on a rank."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head_width = width // HEADS
        self.query, self.key, self.value, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Maps tokens ``[N, T, C]`` to tokens of the same shape."""
        split = [
            layer(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        ]
        output: Tensor = self.proj(F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2))
        return output


class Block(nn.Module):
    """Attention and an MLP, each beside a shortcut."""

    def __init__(self, width: int, attention: type[nn.Module]) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(width), attention(width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps tokens to tokens of the same shape."""
        x = x + self.attn(self.norm1(x))
        output: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return output


class ViT(nn.Module):
    """A vision transformer without a class token."""

    def __init__(
        self, in_channels: int, num_classes: int, width: int, depth: int, attention: type[nn.Module] = JoinedAttention
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_channels, width, PATCH, PATCH)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (SIDE // PATCH) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, attention) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images to logits ``[N, num_classes]``."""
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


def configuration(arguments: argparse.Namespace) -> schema.Config:
    """The configuration of distrain's run."""
    return load_config(
        cli.compose(
            ROOT / "conf",
            "config",
            [
                "strategy=tensor_parallel",
                "model=custom",
                "model._target_=benchmarks.tensor_parallel.ViT",
                f"model.kwargs={{width: {arguments.width}, depth: {arguments.depth}}}",
                "optimizer=adam",
                "data=synthetic",
                f"data.classes={CLASSES}",
                f"data.height={SIDE}",
                f"data.width={SIDE}",
                "data.train_size=512",
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


def parallelized(arguments: argparse.Namespace) -> Callable[[Batch], None]:
    """A step of a bare loop around ``parallelize_module``."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        parallelize_module,
    )

    model = ViT(3, CLASSES, arguments.width, arguments.depth, SeparateAttention).train()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        plan = {
            "attn": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Replicate()),
            **{f"attn.{name}": ColwiseParallel() for name in ("query", "key", "value")},
            "attn.proj": RowwiseParallel(),
            "fc1": ColwiseParallel(),
            "fc2": RowwiseParallel(),
        }
        parallelize_module(block, mesh, plan)
    divided = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
    whole = [parameter for parameter in model.parameters() if not isinstance(parameter, DTensor)]
    groups: list[dict[str, Any]] = [{"params": divided}, {"params": whole}]
    optimizer = torch.optim.Adam(groups, lr=1e-3, fused=True)

    def step(batch: Batch) -> None:
        assert isinstance(batch.targets, Tensor)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(batch.inputs), batch.targets).backward()
        optimizer.step()

    return step


def rank(arguments: argparse.Namespace) -> None:
    """Runs one rank; rank 0 prints."""
    config, world = configuration(arguments), World.from_environment()
    splits = data_source(config.data).load()
    with Runtime(config, world) as runtime:
        trainer = build_trainer(RunPlan.resolve(config, world), runtime, splits)
        batches = itertools.cycle(list(trainer.loaders["train"].epoch(0)))
        steps: dict[str, Callable[[Batch], object]] = {
            "tensor_parallel": trainer.strategy.train_step,
            "parallelize_module": parallelized(arguments),
        }
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
            for name, median in medians.items():
                ratio = median / medians["tensor_parallel"]
                print(f"{name:20} {1000 * median:8.1f} ms a step, tensor_parallel is {ratio:.2f} times as fast")


def main() -> None:
    """Starts the ranks, or is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("rounds", 9), ("steps", 8), ("batch", 16), ("width", 192), ("depth", 6)):
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        rank(arguments)
        return
    module = "benchmarks.tensor_parallel"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={RANKS}", "-m", module]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "BENCHMARK_FOLDER": f"{folder}/run"}
        subprocess.run([*command, *sys.argv[1:]], env=environment, cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
