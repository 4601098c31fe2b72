"""What ``model.checkpoint_activations`` costs: time and memory of steps that keep all activations, some, or none.

One process trains the same model with the same batches, in float32, with SGD and momentum. First a step that keeps all
activations is measured, with all that is held besides (parameters, gradients, optimizer). Then ``auto`` gets a share of
that as its limit. The contenders take turns in the same process: some steps of each in every round. Prints the medians,
the memory of all tensors of a step, and whether the parameters are the same bit for bit in the end.

    python -m benchmarks.activation_checkpointing [--model resnet50] [--pixels 128] [--batch 64] [--share 0.5]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import torch

from distrain.cli import hydra_entry as cli
from distrain.config import schema
from distrain.config.load import load_config
from distrain.data.base import data_source
from distrain.runtime.device import available_cores
from distrain.runtime.live_memory import LiveMemory
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.strategies import held_memory
from distrain.training.assembly import build_trainer
from distrain.training.run_plan import RunPlan
from distrain.training.trainer import Trainer

ROOT = Path(__file__).parent.parent
MIB = 2**20
#: Steps before anything is timed.
WARM_UP = 1


def configuration(arguments: argparse.Namespace, folder: str, chosen: str, limit: float | None) -> schema.Config:
    """The configuration of a contender."""
    keys = [
        f"model={arguments.model}",
        *(("model.stem=imagenet",) if arguments.model.startswith("resnet") else ()),
        f"model.checkpoint_activations={chosen}",
        f"runtime.memory_limit_mb={'null' if limit is None else limit}",
        "optimizer=sgd",
        "optimizer.momentum=0.9",
        "optimizer.lr=1e-3",
        "data=synthetic",
        f"data.height={arguments.pixels}",
        f"data.width={arguments.pixels}",
        f"data.train_size={4 * arguments.batch}",
        "data.test_size=2",
        "data.val_fraction=0",
        f"data.batch_size={arguments.batch}",
        "trainer.memory_format=contiguous",
        f"runtime.threads={arguments.threads}",
        f"run_dir={folder}",
    ]
    return load_config(cli.compose(ROOT / "conf", "config", keys))


def memory_of_step(trainer: Trainer, step: int) -> float:
    """MiB of all tensors at the peak of a step, which is taken."""
    batch = batches_of(trainer)[step]
    with LiveMemory(torch.device("cpu")) as live:
        trainer.strategy.train_step(batch)
    held = sum(held_memory.bytes_by_kind(trainer.strategy.held_tensors()).values())
    return float(held + live.peak) / MIB


def batches_of(trainer: Trainer) -> list:  # type: ignore[type-arg]
    """The batches of an epoch."""
    return list(trainer.loaders["train"].epoch(0))


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--pixels", type=int, default=128)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--share", type=float, default=0.5, help="the limit of auto, as a share of what none takes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="steps of a contender in a round")
    parser.add_argument("--threads", type=int, default=available_cores())
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        first = configuration(arguments, folder, "none", None)
        world = World.from_environment()
        splits = data_source(first.data).load()
        with Runtime(first, world) as runtime:

            def contender(chosen: str, limit: float | None = None) -> Trainer:
                config = configuration(arguments, folder, chosen, limit)
                return build_trainer(RunPlan.resolve(config, world), runtime, splits)

            trainers = {"none": contender("none")}
            # The first step makes the optimizer's state.
            memory_of_step(trainers["none"], 0)
            memory = {"none": memory_of_step(trainers["none"], 1)}
            limit = arguments.share * memory["none"]
            trainers |= {"auto": contender("auto", limit), "all": contender("all")}
            for name in ("auto", "all"):
                memory_of_step(trainers[name], 0)
                memory[name] = memory_of_step(trainers[name], 1)
            batches = itertools.cycle(batches_of(trainers["none"])[2:])
            seconds: dict[str, list[float]] = {name: [] for name in trainers}
            for _ in range(WARM_UP + arguments.rounds):
                of_round = [next(batches) for _ in range(arguments.steps)]
                for name, trainer in trainers.items():
                    start = time.perf_counter()
                    for batch in of_round:
                        trainer.strategy.train_step(batch)
                    seconds[name].append((time.perf_counter() - start) / arguments.steps)
            plain = trainers["none"].strategy.model_state()
            print(f"{arguments.model}, {arguments.pixels} pixels, batch {arguments.batch}, {arguments.threads} threads")
            print(f"auto may take {limit:,.0f} MiB")
            median = {name: statistics.median(times[WARM_UP:]) for name, times in seconds.items()}
            for name, trainer in trainers.items():
                state = trainer.strategy.model_state()
                same = all(torch.equal(tensor, plain[key]) for key, tensor in state.items())
                print(
                    f"{name:5} {1000 * median[name]:8.0f} ms a step, {median[name] / median['none']:.2f} x; "
                    f"{memory[name]:7,.0f} MiB, {memory[name] / memory['none']:.2f} x; "
                    f"{'same bits' if same else 'OTHER PARAMETERS'}"
                )


if __name__ == "__main__":
    main()
