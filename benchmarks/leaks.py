"""Whether a training that goes on and on needs more and more: memory and open descriptors of each rank, step by step.

Data parallelism with metrics, TensorBoard and progress as by default. Exits with 1 if, once it is warm, a rank's memory
has grown by 2 MB or more or a descriptor has stayed open. What else is said goes to the training.

    python benchmarks/leaks.py [--steps 2000] [--ranks 2] [compression=powersgd] [strategy=local_sgd]
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
#: Allocator, imports at first use, TensorBoard's queue: what they need they have after so many steps.
WARMUP = 500
EVERY = 100
LIMIT_MB = 2.0


def rank(steps: int, folder: str, overrides: list[str]) -> None:
    """Trains, and writes what this process had open and in memory every so many steps."""
    import torch

    from benchmarks.contenders import fit
    from distrain.training.callbacks import Callback

    found: list[tuple[int, float, int]] = []

    class Watch(Callback):
        def on_step_end(self, trainer: Any) -> None:
            step = trainer.progress.step
            if step % EVERY == 0:
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                found.append(
                    (step, pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(list(Path("/proc/self/fd").iterdir())))
                )

    torch.set_num_threads(1)
    # Few images, so that the steps are many in little time; what a step leaves behind is the same.
    fit("cnn", 2, WARMUP + steps, folder, lambda trainer: trainer.callbacks.append(Watch()), *overrides)
    Path(folder, f"rank_{os.environ['RANK']}.json").write_text(json.dumps(found))


def main() -> None:
    """Runs as the launcher, or with ``--folder`` as one rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="as for launch/train.py")
    arguments = parser.parse_args()
    if arguments.folder:
        rank(arguments.steps, arguments.folder, arguments.overrides)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={arguments.ranks}", __file__]
        command += ["--steps", str(arguments.steps), "--folder", folder, *arguments.overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600, check=False)
        found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("rank_*"))]
    if done.returncode or len(found) != arguments.ranks:
        raise SystemExit(f"the training failed:\n{done.stdout}\n{done.stderr}")
    print(f"{'step':>8}" + "".join(f"{f'rank {each} MB':>14}{'open':>6}" for each in range(len(found))))
    for rows in zip(*found, strict=True):
        print(f"{rows[0][0]:8}" + "".join(f"{memory:14.1f}{opened:6}" for _, memory, opened in rows))
    grown = []
    for each in found:
        warm, last = next(row for row in each if row[0] >= WARMUP), each[-1]
        grown.append((last[1] - warm[1], last[2] - warm[2]))
    print("since warm-up: " + ", ".join(f"{memory:+.1f} MB and {opened:+} open" for memory, opened in grown))
    if any(memory >= LIMIT_MB or opened > 0 for memory, opened in grown):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
