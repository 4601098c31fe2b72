"""Compares distrain's pipeline with a bare script around ``torch.distributed.pipelining``.

Both use the same model (ResNet-18 with GroupNorm on images of CIFAR-10's shape), the same two stages, the same schedule
and microbatches, one thread per rank, float32, contiguous layout, and images in memory. Contenders take turns. Prints
the medians and their ratio.

    python benchmarks/pipeline.py [--rounds 5] [--steps 20] [--batch 32] [--microbatches 4] [--schedule 1f1b]
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distrain.cli import hydra_entry as cli
from distrain.config import schema
from distrain.config.load import load_config
from distrain.data.base import data_source
from distrain.models.build import instantiate_model
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.training.assembly import build_trainer
from distrain.training.callbacks import Callback
from distrain.training.run_plan import RunPlan

ROOT = Path(__file__).parent.parent
IMAGES = 1024
WARMUP = 5
BOUNDARY = "layer3_0"


def load_configuration(arguments: argparse.Namespace) -> schema.Config:
    """The run's configuration; both contenders take the model from it."""
    return load_config(
        cli.compose(
            ROOT / "conf",
            "config",
            [
                "strategy=pipeline",
                f"strategy.schedule={arguments.schedule}",
                f"strategy.microbatches={arguments.microbatches}",
                f"strategy.boundaries=[{BOUNDARY}]",
                "model=resnet18",
                "model.norm=group",
                "data=synthetic",
                f"data.train_size={IMAGES}",
                "data.test_size=64",
                "data.val_fraction=0",
                f"data.batch_size={arguments.batch}",
                f"trainer.max_steps={WARMUP + arguments.steps}",
                "trainer.epochs=1000000",
                "trainer.memory_format=contiguous",
                "checkpoint.every_epochs=1000000",
                "runtime.threads=1",
                f"run_dir={os.environ['BENCHMARK_FOLDER']}",
            ],
        )
    )


def distrain(arguments: argparse.Namespace) -> float:
    """Runs ``strategy=pipeline``; returns the seconds of the timed steps."""
    checked, world = load_configuration(arguments), World.from_environment()
    marks: list[float] = []

    class RecordTime(Callback):
        def on_step_end(self, trainer: Any) -> None:
            marks.append(time.perf_counter())

    splits = data_source(checked.data).load()
    with Runtime(checked, world) as runtime:
        trainer = build_trainer(RunPlan.resolve(checked, runtime.world), runtime, splits)
        trainer.callbacks.append(RecordTime())
        trainer.fit()
    return marks[-1] - marks[WARMUP - 1]


def bare(arguments: argparse.Namespace) -> float:
    """The same by hand with torch's stage and schedule; returns the seconds of the timed steps."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = instantiate_model(load_configuration(arguments).model, in_channels=3, num_classes=10, image_size=(32, 32))
    assert isinstance(model, nn.Sequential)
    cut = [name for name, _ in model.named_children()].index(BOUNDARY)
    part = nn.Sequential(*list(model)[:cut]) if rank == 0 else nn.Sequential(*list(model)[cut:])
    size = arguments.batch // arguments.microbatches
    image = torch.zeros(size, 3, 32, 32, device="meta")
    between = copy.deepcopy(nn.Sequential(*list(model)[:cut])).to("meta")(image).detach().requires_grad_()
    logits = torch.zeros(size, 10, device="meta").requires_grad_()
    # Without given shapes, torch would run the real module to find them.
    inputs, outputs = ((image,), between) if rank == 0 else ((between,), logits)
    stage = PipelineStage(part, rank, 2, torch.device("cpu"), input_args=inputs, output_args=outputs)
    kinds = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}
    schedule = kinds[arguments.schedule](stage, arguments.microbatches, loss_fn=nn.functional.cross_entropy)
    optimizer = torch.optim.Adam(part.parameters(), lr=1e-3, fused=True)
    images, labels = torch.randn(IMAGES, 3, 32, 32), torch.randint(10, (IMAGES,))
    start = 0.0
    for step in range(WARMUP + arguments.steps):
        if step == WARMUP:
            start = time.perf_counter()
        picked = torch.randint(IMAGES, (arguments.batch,))
        optimizer.zero_grad(set_to_none=True)
        if rank == 0:
            schedule.step(images[picked])
        else:
            schedule.step(target=labels[picked])
        optimizer.step()
    seconds = time.perf_counter() - start
    dist.destroy_process_group()
    return seconds


CONTENDERS = {"bare": bare, "distrain": distrain}


def measure(name: str, arguments: argparse.Namespace, given: list[str]) -> float:
    """Runs one contender in fresh processes under torchrun; returns its images per second."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", __file__, *given]
        command += ["--contender", name, "--result", folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "BENCHMARK_FOLDER": f"{folder}/run"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
        results = [float(json.loads(path.read_text())) for path in Path(folder).glob("rank_*.json")]
    if done.returncode or len(results) != 2:
        raise SystemExit(f"{name} failed:\n{done.stdout}\n{done.stderr}")
    return float(arguments.batch * arguments.steps / max(results))


def main() -> None:
    """Runs as the launcher, or with ``--contender`` as one rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--schedule", choices=["1f1b", "gpipe"], default="1f1b")
    parser.add_argument("--contender", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        torch.set_num_threads(1)
        seconds = CONTENDERS[arguments.contender](arguments)
        (arguments.result / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(seconds))
        return
    rates: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(arguments.rounds):
        for name in CONTENDERS:
            rates[name].append(measure(name, arguments, sys.argv[1:]))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, values in rates.items():
        print(f"{name:10} {medians[name]:8.1f} images/s (min {min(values):.1f}, max {max(values):.1f})")
    print(f"distrain ÷ bare: {medians['distrain'] / medians['bare']:.3f}")


if __name__ == "__main__":
    main()
