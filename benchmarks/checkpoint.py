"""Measures the cost of saving during training: ResNet-18 with a checkpoint every 10 steps, or with none.

=============  =======================================================================================================
``never``      no checkpoint until the end
``background`` a copy of the state every 10 steps, written while training continues (``checkpoint.background=true``)
``foreground`` training waits until the checkpoint is written (``checkpoint.background=false``)
=============  =======================================================================================================

Contenders take turns in fresh processes with one thread per rank and 32 images per rank and step. The slowdown is the
median over the rounds of (a contender's time ÷ that of ``never`` in the same round) − 1. The stall is the time by which
one save delays the next step. Prints a table, and writes JSON with ``--json``.

    python benchmarks/checkpoint.py [--rounds 5] [--steps 60] [--ranks 1] [--optimizers sgd adam] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
EVERY = 10
#: Timing starts halfway between two saves, so that the whole cost of each save is measured.
WARMUP = EVERY + EVERY // 2
#: More epochs than any run has.
NEVER = 1_000_000
CONTENDERS = {
    "never": [],
    "background": [f"checkpoint.every_steps={EVERY}", "checkpoint.background=true"],
    "foreground": [f"checkpoint.every_steps={EVERY}", "checkpoint.background=false"],
}
OPTIMIZERS = {"sgd": ["optimizer=sgd", "optimizer.momentum=0.9"], "adam": ["optimizer=adam"]}
TRAINING = [
    "model=resnet18",
    "data=synthetic",
    "data.channels=3",
    "data.height=32",
    "data.width=32",
    "data.classes=10",
    "data.train_size=12800",
    "data.test_size=64",
    "data.val_fraction=0",
    "scheduler=constant",
    "trainer.epochs=1000",
    "trainer.progress=off",
    "runtime.threads=1",
    "logger=none",
    f"checkpoint.every_epochs={NEVER}",
]


def train(overrides: list[str], steps: int) -> dict[str, Any]:
    """Runs one rank; returns the seconds of the timed steps, and the run's own figures about its checkpoints."""
    from distrain.cli import hydra_entry as cli
    from distrain.config.load import load_config
    from distrain.data.base import data_source
    from distrain.runtime.runtime import Runtime
    from distrain.runtime.world import World
    from distrain.training.assembly import build_trainer
    from distrain.training.callbacks import Callback
    from distrain.training.run_plan import RunPlan

    ticks: dict[int, float] = {}

    class RecordTime(Callback):
        def on_step_end(self, trainer: Any) -> None:
            ticks[trainer.progress.step] = time.perf_counter()

    checked = load_config(cli.compose(ROOT / "conf", "config", overrides))
    world = World.from_environment()
    splits = data_source(checked.data).load()
    with Runtime(checked, world) as runtime:
        trainer = build_trainer(RunPlan.resolve(checked, runtime.world), runtime, splits)
        trainer.callbacks.append(RecordTime())
        summary = trainer.fit()
    return {"seconds": ticks[WARMUP + steps] - ticks[WARMUP], **summary["checkpoint"]}


def measure(contender: str, optimizer: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs one contender in fresh processes; returns the figures of rank 0."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        overrides = [
            *TRAINING,
            *OPTIMIZERS[optimizer],
            *CONTENDERS[contender],
            f"strategy={'single' if arguments.ranks == 1 else 'ddp'}",
            f"data.batch_size={32 * arguments.ranks}",
            f"trainer.max_steps={WARMUP + arguments.steps}",
            f"run_dir={folder}/run",
        ]
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={arguments.ranks}", __file__]
        command += ["--rank", json.dumps(overrides), "--steps", str(arguments.steps), "--result", f"{folder}/result"]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
        result = Path(folder, "result")
        if done.returncode or not result.exists():
            raise SystemExit(f"{contender} failed:\n{done.stdout}\n{done.stderr}")
        figures: dict[str, Any] = json.loads(result.read_text())
        return figures


def table(results: dict[str, list[dict[str, Any]]], optimizer: str, arguments: argparse.Namespace) -> str:
    """Medians over the rounds, and the longest stall of all."""
    baseline = [run["seconds"] for run in results["never"]]
    lines = [
        f"\n{optimizer}, {arguments.ranks} rank(s), {arguments.rounds} rounds of {arguments.steps} steps",
        f"{'':12}{'ms a step':>11}{'slowdown':>10}{'stall ms':>10}{'longest':>9}{'written in s':>14}",
    ]
    for name, runs in results.items():
        step = statistics.median(run["seconds"] for run in runs) / arguments.steps
        slowdown = statistics.median(run["seconds"] / base - 1 for run, base in zip(runs, baseline, strict=True))
        stall = statistics.median(run["stall_ms"]["mean"] for run in runs)
        longest = max(run["stall_ms"]["max"] for run in runs)
        seconds = statistics.median(run["write_seconds"] for run in runs)
        lines.append(f"{name:12}{1000 * step:11.1f}{slowdown:10.2%}{stall:10.1f}{longest:9.1f}{seconds:14.2f}")
    return "\n".join(lines)


def main() -> None:
    """Runs as the launcher, or with ``--rank`` as one rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help=f"timed steps; a multiple of {EVERY}")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument(
        "--folder", type=Path, help="parent of the run folders; by default the system's temporary folder"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        result = train(json.loads(arguments.rank), arguments.steps)
        if os.environ["RANK"] == "0":
            arguments.result.write_text(json.dumps(result))
        return
    report = {}
    names = ["never", *(name for name in arguments.only if name != "never")]
    for optimizer in arguments.optimizers:
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for round_ in range(arguments.rounds):
            # In reverse order every other time, so that a machine that slows down affects all alike.
            for name in names if round_ % 2 == 0 else reversed(names):
                results[name].append(measure(name, optimizer, arguments))
        report[optimizer] = results
        print(table(results, optimizer, arguments), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
