"""Compares the memory that ``distrain plan`` predicts with what torch allocates, on CPUs.

In each setting, a model and an optimizer, some configurations are trained for a few steps while torch's profiler notes
every allocation of the process from the making of the model on. The largest sum of what is allocated at any time of the
last steps, on the rank that has most, is compared with the prediction. Images, the process itself and what libraries
allocate by other means are in neither.

    python benchmarks/plan_memory.py [--models simple_cnn cifar_cnn resnet18] [--optimizers sgd adam]
        [--ranks 1 2 4] [--folder memory]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import itertools
import json
import logging
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from typing_extensions import override

from distrain.cli.hydra_entry import skip_destructors_after_communication
from distrain.cli.training_keys import compose_training
from distrain.data.base import Splits
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.tools.planning import engine
from distrain.tools.planning.divided_model import Divisions
from distrain.tools.planning.measurement import measure
from distrain.tools.planning.phases import PhaseClock
from distrain.tools.planning.plan import typed
from distrain.tools.planning.plan_keys import with_keys
from distrain.training.assembly import build_trainer
from distrain.training.callbacks import Callback, RunView
from distrain.training.run_plan import RunPlan
from distrain.verification.rank_runs import quiet
from distrain.verification.short_runs import first_samples, shortened

#: Keys of the models' trainings.
KEYS = {
    "simple_cnn": ["model=simple_cnn", "data=digits", "data.batch_size=64"],
    "cifar_cnn": ["model=cifar_cnn", "data=synthetic", "data.batch_size=64"],
    "resnet18": ["model=resnet18", "data=synthetic", "data.batch_size=16"],
}
#: Few images, since a loader's copy of them is not predicted.
COMMON = ["runtime.threads=1", "data.eval_batch_size=2", "data.limit=135"]
#: By number of ranks.
CONFIGURATIONS = {
    1: ["strategy=single"],
    2: [
        "strategy=ddp",
        "strategy=fsdp strategy.shard=optimizer",
        "strategy=fsdp strategy.shard=gradients",
        "strategy=fsdp strategy.shard=full",
        "strategy=fsdp strategy.shard=full strategy.reshard_after_forward=false",
        "strategy=local_sgd strategy.sync_every=4",
        "strategy=pipeline strategy.stages=2 strategy.schedule=1f1b strategy.microbatches=4",
        "strategy=pipeline strategy.stages=2 strategy.schedule=gpipe strategy.microbatches=4",
    ],
    4: [
        "strategy=tensor_parallel",
        "strategy=mesh strategy.mesh.data=2 strategy.mesh.tensor=2",
        "strategy=mesh strategy.mesh.shard=2 strategy.mesh.tensor=2 strategy.shard=gradients",
        "strategy=mesh strategy.mesh.shard=2 strategy.mesh.pipeline=2 strategy.shard=gradients strategy.schedule=1f1b "
        "strategy.microbatches=4",
        "strategy=mesh strategy.mesh.pipeline=2 strategy.mesh.tensor=2 strategy.schedule=1f1b strategy.microbatches=4",
    ],
}
#: Strategies of these configurations.
STRATEGIES = ("single", "ddp", "fsdp", "tensor_parallel", "pipeline", "mesh", "local_sgd")
#: Steps of a run, the last of which have two merges of ``local_sgd``.
STEPS, LAST = 13, 8
MARK = "end of step"
#: Ranks of a host reserve addresses of so many bytes for messages in shared memory. Little of it is ever used.
RESERVED = 2**32
#: What predictions should keep.
LIMIT = 0.10


class Marks(Callback):
    """Notes in the profile when steps end."""

    @override
    def on_step_end(self, run: RunView) -> None:
        with record_function(MARK):
            pass


def main() -> None:
    """Runs all settings and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(KEYS), choices=KEYS)
    parser.add_argument("--optimizers", nargs="+", default=["sgd", "adam"])
    parser.add_argument("--ranks", nargs="+", type=int, default=list(CONFIGURATIONS), choices=CONFIGURATIONS)
    parser.add_argument("--folder", type=Path, default=Path("memory"))
    parser.add_argument("--on-rank", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.on_rank:
        on_rank(arguments.on_rank, arguments.folder)
        return
    print("predicted MiB  measured MiB   error  setting")
    errors = []
    for model, optimizer, ranks in itertools.product(arguments.models, arguments.optimizers, arguments.ranks):
        folder = (arguments.folder / f"{model}_{optimizer}_{ranks}").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        own = [__file__, "--folder", str(folder), "--on-rank", *KEYS[model], *COMMON, f"optimizer={optimizer}"]
        subprocess.run([*torchrun, *own], check=True, stderr=subprocess.DEVNULL)
        for row in json.loads((folder / "memory.json").read_text()):
            error = row["predicted"]["total"] / row["measured"] - 1
            errors.append(abs(error))
            predicted, measured = row["predicted"]["total"] / 2**20, row["measured"] / 2**20
            print(f"{predicted:13.1f}  {measured:12.1f}  {error:+6.1%}  {model} {optimizer} {row['keys']}", flush=True)
    within = sum(one <= LIMIT for one in errors)
    print(f"mean error {statistics.mean(errors):.1%}, largest {max(errors):.1%}; {within} of {len(errors)} within 10%")


def on_rank(keys: Sequence[str], folder: Path) -> None:
    """What each rank of a setting does; rank 0 writes ``memory.json``."""
    world = World.from_environment()
    config = compose_training(keys)
    options = engine.Options(strategies=STRATEGIES, compressors=())
    divisions = Divisions(with_keys(config, {"strategy": "tensor_parallel"}), STRATEGIES, None)
    run, _ = engine.check(config, world, options)
    rows: list[dict[str, Any]] = []
    with contextlib.closing(run.load()) as splits:
        measured = measure(run, world, splits, {}, PhaseClock(), divisions=divisions if world.size > 2 else None)
        found = engine.predict(measured.workload, measured.cluster, options).predictions
        predictions = {typed(prediction.keys): prediction for prediction in found}
        for number, name in enumerate(CONFIGURATIONS[world.size]):
            prediction = predictions[name]
            peak = peak_bytes(with_keys(config, prediction.keys), world, splits, folder / str(number))
            rows.append({"keys": name, "predicted": prediction.memory.to_plain(), "measured": peak})
    if world.rank == 0:
        (folder / "memory.json").write_text(json.dumps(rows, indent=1))
    skip_destructors_after_communication()


def peak_bytes(config: Any, world: World, splits: Splits, folder: Path) -> float:
    """Most bytes that a rank has allocated in the last steps of a short run."""
    plan = RunPlan.resolve(config, world)
    plan = plan.with_config(dataclasses.replace(shortened(plan.config, STEPS), run_dir=str(folder)))
    small = dataclasses.replace(splits, val=first_samples(splits.val, 0), test=first_samples(splits.test, 2))
    gc.collect()
    with quiet(), Runtime(plan.config, world) as runtime:
        logging.getLogger("distrain").setLevel(logging.WARNING)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            trainer = build_trainer(plan, runtime, small)
            trainer.callbacks.append(Marks())
            trainer.fit()
        own = torch.tensor([peak_of(profiler)], dtype=torch.float64)
        return float(runtime.communicator().all_reduce(own, "max") if world.size > 1 else own)


def peak_of(profiler: Any) -> float:
    """Most bytes that were allocated at once in the last steps."""
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    ends = [event.start_ns() for event in events if event.name() == MARK]
    held = peak = 0
    for event in events:
        if event.name() == "[memory]" and abs(event.nbytes()) < RESERVED:
            held += event.nbytes()
            if ends[-1 - LAST] <= event.start_ns() <= ends[-1]:
                peak = max(peak, held)
    return float(peak)


if __name__ == "__main__":
    main()
