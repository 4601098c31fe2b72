"""Where the time of a training step goes, and what distrain costs beside a bare loop and its peers, in one run.

Data parallelism on synthetic CIFAR-10-shaped images that lie in memory, one thread a rank:

==============  ======================================================================================================
``alone``       a hand-written loop in processes that never talk: fused Adam, tensors in memory; the limit
``bare``        the same loop around torch's DistributedDataParallel
``distrain``    ``launch/train.py strategy=ddp`` in the same layout and precision: metrics, accounting, logs and all
``defaults``    the same with nothing said about layout and precision
``lightning``   a LightningModule and Trainer with a DataLoader, as Lightning's documentation does it
``accelerate``  ``accelerator.prepare`` with a DataLoader, as Accelerate's documentation does it
==============  ======================================================================================================

The first four train the same module. Every contender times the same steps after the same warm-up in processes of its
own; contenders take turns, several rounds, so that a machine whose speed drifts treats all alike. Images a second are
of runs that nothing watches. Each of the first three runs a second time a round with marks between the phases of its
steps, whose milliseconds are also given in % of a whole step of ``alone``. All figures are medians of the rounds.

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
WATCHED = ("alone", "bare", "distrain")
#: Images a rank and step, steps before the timed ones, and the timed ones.
SIZES = {"cnn": (16, 30, 200), "resnet18": (32, 3, 12)}
#: What must hold, as rate of one ÷ rate of the other.
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
    """One contender's images/s and, where asked for, the first rank's phases, in fresh processes under torchrun."""
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


def summarised(
    rates: Mapping[str, Sequence[float]], phases: Mapping[str, Sequence[dict[str, float]]]
) -> dict[str, Any]:
    """Medians of the rounds."""
    found: dict[str, Any] = {}
    for name, values in rates.items():
        found[name] = {"images_per_second": statistics.median(values), "min": min(values), "max": max(values)}
    for name, rounds in phases.items():
        medians = {part: statistics.median(each[part] for each in rounds) for part in rounds[0]}
        found[name]["milliseconds"] = {**medians, "step": statistics.median(map(whole, rounds))}
    return found


def whole(parts: Mapping[str, float]) -> float:
    """A step's milliseconds; what runs beside its phases is not part of the sum."""
    return sum(value for part, value in parts.items() if part not in ("hidden", "collections"))


def show(found: Mapping[str, Any], arguments: argparse.Namespace) -> None:
    """Prints the tables."""
    print(
        f"\n{arguments.model}, {arguments.ranks} ranks, {arguments.images} images each, {arguments.memory_format}, "
        f"{arguments.precision}: medians of {arguments.rounds} rounds of {arguments.steps} steps\n"
    )
    limit = found.get("alone")
    print(f"{'':12}{'images/s':>10}{'min':>9}{'max':>9}{'÷ alone':>9}")
    for name, each in found.items():
        share = f"{each['images_per_second'] / limit['images_per_second']:9.2f}" if limit else ""
        print(f"{name:12}{each['images_per_second']:10,.0f}{each['min']:9,.0f}{each['max']:9,.0f}{share}")
    watched = [name for name in found if "milliseconds" in found[name]]
    if watched:
        print(f"\n{'ms a step':20}" + "".join(f"{name + (' (%)' if limit else ''):>20}" for name in watched))
        step = limit["milliseconds"]["step"] if limit else 0
        for part, title in ROWS.items():
            cells = [found[name]["milliseconds"][part] for name in watched]
            shown = (f"{cell:.2f}" + (f" ({100 * cell / step:5.1f})" if step else "") for cell in cells)
            print(f"{title:20}" + "".join(f"{cell:>20}" for cell in shown))
    print()
    for one, other in RATIOS:
        if one in found and other in found:
            print(f"{one} ÷ {other}: {found[one]['images_per_second'] / found[other]['images_per_second']:.2f}")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--model", choices=list(SIZES), default="cnn")
    parser.add_argument("--images", type=int, help="a rank and step; 16 for cnn, 32 for resnet18")
    parser.add_argument("--memory-format", choices=["contiguous", "channels_last"], default="contiguous")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="timed ones; 200 for cnn, 12 for resnet18")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--no-phases", action="store_true", help="only whole steps, in half the time")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    images, _, steps = SIZES[arguments.model]
    arguments.images, arguments.steps = arguments.images or images, arguments.steps or steps
    rates: dict[str, list[float]] = defaultdict(list)
    phases: dict[str, list[dict[str, float]]] = defaultdict(list)
    for _ in range(arguments.rounds):
        for name in arguments.only:
            rates[name].append(measure(name, arguments, phases=False)[0])
            if name in WATCHED and not arguments.no_phases:
                phases[name].append(measure(name, arguments, phases=True)[1])
    found = summarised(rates, phases)
    show(found, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
