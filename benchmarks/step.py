"""Measures the parts of a training step, and compares distrain with a bare loop and with other frameworks.

Data parallelism on synthetic images of CIFAR-10's shape in memory, one thread per rank:

==============  ======================================================================================================
``alone``       a hand-written loop in processes that never communicate, with fused Adam; the limit
``bare``        the same loop around torch's DistributedDataParallel
``distrain``    ``launch/train.py strategy=ddp`` in the same layout and precision: metrics, accounting, logs and all
``defaults``    the same with distrain's default layout and precision
``lightning``   a LightningModule and Trainer with a DataLoader, as in Lightning's documentation
``accelerate``  ``accelerator.prepare`` with a DataLoader, as in Accelerate's documentation
==============  ======================================================================================================

The first four train the same module. Every contender times the same number of steps after the same warm-up, in
processes of its own. Contenders take turns for several rounds, so that a machine whose speed drifts affects all alike.
Images per second come from runs without instrumentation. In each round, each of the first three runs a second time with
time stamps between the phases of its steps; their milliseconds are also given in % of a whole step of ``alone``. All
figures are medians over the rounds.

    python benchmarks/step.py [--model resnet18 --images 32] [--memory-format channels_last] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CONTENDERS = ("alone", "bare", "distrain", "defaults", "lightning", "accelerate")
INSTRUMENTED = ("alone", "bare", "distrain")
#: Images per rank and step, warm-up steps, and timed steps.
SIZES = {"cnn": (16, 30, 200), "resnet18": (32, 3, 12)}
#: Pairs of contenders whose rates are compared, as first ÷ second.
RATIOS = (
    ("distrain", "alone"),
    ("distrain", "bare"),
    ("defaults", "lightning"),
    ("defaults", "accelerate"),
)
ROWS = {
    "data": "next batch",
    "forward": "forward, loss",
    "backward": "backward",
    "exchange": "exchange, exposed",
    "optimizer": "optimizer",
    "log": "logging",
    "python": "everything else",
    "step": "whole step",
    "hidden": "exchange, hidden",
    "collections": "garbage collection",
}


def measure(name: str, arguments: argparse.Namespace, *, phases: bool) -> tuple[float, dict[str, float]]:
    """Runs one contender in fresh processes under torchrun.

    Returns:
        Images per second of all ranks, and milliseconds by phase of rank 0 if ``phases`` is set.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = {
            "contender": name,
            "model": arguments.model,
            "share": arguments.images,
            "warmup": SIZES[arguments.model][1],
            "steps": arguments.steps,
            "layout": arguments.memory_format,
            "precision": arguments.precision,
            "phases": phases,
            "folder": folder,
        }
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={arguments.ranks}"]
        command += ["-m", "benchmarks.contenders", json.dumps(job)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
        results: list[dict[str, Any]] = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("rank_*"))]
    if done.returncode or len(results) != arguments.ranks:
        raise SystemExit(f"{name} failed:\n{done.stdout}\n{done.stderr}")
    rate = sum(arguments.images * arguments.steps / result["seconds"] for result in results)
    return rate, results[0]["phases"]


def summarise(rates: Mapping[str, Sequence[float]], phases: Mapping[str, Sequence[dict[str, float]]]) -> dict[str, Any]:
    """Medians over the rounds."""
    results: dict[str, Any] = {}
    for name, values in rates.items():
        results[name] = {"images_per_second": statistics.median(values), "min": min(values), "max": max(values)}
    for name, rounds in phases.items():
        medians = {part: statistics.median(each[part] for each in rounds) for part in rounds[0]}
        results[name]["milliseconds"] = {**medians, "step": statistics.median(map(step_milliseconds, rounds))}
    return results


def step_milliseconds(parts: Mapping[str, float]) -> float:
    """Milliseconds of a whole step; what overlaps with its phases is not added."""
    return sum(value for part, value in parts.items() if part not in ("hidden", "collections"))


def show(results: Mapping[str, Any], arguments: argparse.Namespace) -> None:
    """Prints the tables."""
    print(
        f"\n{arguments.model}, {arguments.ranks} ranks, {arguments.images} images per rank, {arguments.memory_format}, "
        f"{arguments.precision}: medians of {arguments.rounds} rounds of {arguments.steps} steps\n"
    )
    limit = results.get("alone")
    print(f"{'':12}{'images/s':>10}{'min':>9}{'max':>9}{'÷ alone':>9}")
    for name, each in results.items():
        share = f"{each['images_per_second'] / limit['images_per_second']:9.2f}" if limit else ""
        print(f"{name:12}{each['images_per_second']:10,.0f}{each['min']:9,.0f}{each['max']:9,.0f}{share}")
    instrumented = [name for name in results if "milliseconds" in results[name]]
    if instrumented:
        print(f"\n{'ms a step':20}" + "".join(f"{name + (' (%)' if limit else ''):>20}" for name in instrumented))
        step = limit["milliseconds"]["step"] if limit else 0
        for part, title in ROWS.items():
            cells = [results[name]["milliseconds"][part] for name in instrumented]
            shown = (f"{cell:.2f}" + (f" ({100 * cell / step:5.1f})" if step else "") for cell in cells)
            print(f"{title:20}" + "".join(f"{cell:>20}" for cell in shown))
    print()
    for one, other in RATIOS:
        if one in results and other in results:
            print(f"{one} ÷ {other}: {results[one]['images_per_second'] / results[other]['images_per_second']:.2f}")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--model", choices=list(SIZES), default="cnn")
    parser.add_argument("--images", type=int, help="images per rank and step; default: 16 for cnn, 32 for resnet18")
    parser.add_argument("--memory-format", choices=["contiguous", "channels_last"], default="contiguous")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="timed steps; default: 200 for cnn, 12 for resnet18")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--no-phases", action="store_true", help="measure only whole steps, in half the time")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    images, _, steps = SIZES[arguments.model]
    arguments.images, arguments.steps = arguments.images or images, arguments.steps or steps
    rates: dict[str, list[float]] = defaultdict(list)
    phases: dict[str, list[dict[str, float]]] = defaultdict(list)
    for _ in range(arguments.rounds):
        for name in arguments.only:
            rates[name].append(measure(name, arguments, phases=False)[0])
            if name in INSTRUMENTED and not arguments.no_phases:
                phases[name].append(measure(name, arguments, phases=True)[1])
    results = summarise(rates, phases)
    show(results, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
