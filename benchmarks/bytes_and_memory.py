"""What each strategy sends in a step and keeps of a model's state: the table of ``docs/strategies.md``.

Trains a few steps under each strategy on ranks of this host, in float32 with Adam, and reads ``summary.json``. Prints a
row for each: what a rank sends in a step, the mean of all ranks, and what it keeps of parameters, gradients and the
optimizer's state, each of the rank that has most of it. Sizes are MB, 10⁶ bytes.

    python -m benchmarks.bytes_and_memory [--ranks 4] [--models resnet18 vit] [--ways ddp "fsdp full"] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
#: Steps of a run: memory is measured in a step after the first one, when the optimizer has its state.
STEPS = 4
#: Whole batches, and as few images besides as possible.
COMMON = (
    *("data=synthetic", "data.channels=3", "data.height=32", "data.width=32", "data.classes=10", "data.val_fraction=0"),
    *("data.train_size=256", "data.test_size=8", "optimizer=adam", "trainer.precision=fp32", "runtime.threads=1"),
    *("trainer.memory_format=channels_last", f"trainer.max_steps={STEPS}", "logger=none", "trainer.progress=off"),
)
MODELS = {
    "resnet18": ("model=resnet18", "data.batch_size=32"),
    "vit": (
        *("model=custom", "model._target_=benchmarks.tensor_parallel.ViT", "model.kwargs={width: 192, depth: 6}"),
        "data.batch_size=16",
    ),
}
KEPT = ("parameters", "gradients", "optimizer")
MIB = 2**20


def ways(ranks: int) -> dict[str, tuple[str, ...]]:
    """Strategies by what they are called, with their keys."""
    found = {
        "single": ("strategy=single",),
        "ddp": ("strategy=ddp",),
        "ddp powersgd": ("strategy=ddp", "compression=powersgd"),
        "parameter_server": ("strategy=parameter_server",),
        **{
            f"fsdp {shard}": ("strategy=fsdp", f"strategy.shard={shard}")
            for shard in ("optimizer", "gradients", "full")
        },
        "tensor_parallel": ("strategy=tensor_parallel",),
        "pipeline": ("strategy=pipeline", f"strategy.stages={ranks}", "strategy.microbatches=4"),
    }
    if ranks % 2 or ranks < 4:
        return found
    half = ranks // 2
    for outer, inner, *more in (
        ("data", "shard"),
        ("data", "tensor"),
        ("data", "pipeline"),
        ("pipeline", "tensor"),
        ("shard", "tensor", "strategy.shard=gradients"),
        ("shard", "pipeline", "strategy.shard=gradients"),
    ):
        shape = (f"strategy.mesh.{outer}={half}", f"strategy.mesh.{inner}=2")
        found[f"mesh {outer} × {inner}"] = ("strategy=mesh", *shape, *more)
    return found


def summary(ranks: int, keys: tuple[str, ...], folder: str) -> dict[str, Any]:
    """Content of ``summary.json`` of a short run."""
    command = [sys.executable, "-m", "distrain", "train", *([f"nproc={ranks}"] if ranks > 1 else [])]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [*command, *COMMON, *keys, f"run_dir={folder}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stdout[-3000:])
    content: dict[str, Any] = json.loads(Path(folder, "summary.json").read_text())
    return content


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--ways", nargs="+", default=[], help="only these strategies, such as 'fsdp full'")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    arguments = parser.parse_args()
    rows = []
    print(f"{'strategy':24}{'model':10}{'sent':>8}{'kept':>8}   {', '.join(KEPT)}")
    for model in arguments.models:
        for way, keys in ways(arguments.ranks).items():
            if arguments.ways and way not in arguments.ways:
                continue
            with tempfile.TemporaryDirectory() as folder:
                found = summary(1 if way == "single" else arguments.ranks, (*MODELS[model], *keys), folder)
            kept = [found["memory_by_kind_mb"]["measured"][kind] * MIB / 1e6 for kind in KEPT]
            sent = found["bytes_sent_per_step"] / found["world_size"] / 1e6
            rows.append({"model": model, "way": way, "sent": sent, **dict(zip(KEPT, kept, strict=True))})
            parts = ", ".join(f"{size:.1f}" for size in kept)
            print(f"{way:24}{model:10}{sent:8.1f}{sum(kept):8.1f}   {parts}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
