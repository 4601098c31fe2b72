"""Looks for leaks in a long training: records memory and open file descriptors of each rank over many steps.

Trains by data parallelism with the default metrics, TensorBoard and progress bar. Exits with 1 if, after the warm-up,
a rank's memory has grown by 2 MB or more or a descriptor has stayed open. Further arguments are keys of the training.

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
#: After this many steps the allocator, imports at first use and TensorBoard's queue have reached their final size.
WARMUP = 500
EVERY = 100
LIMIT_MB = 2.0


def rank(steps: int, folder: str, overrides: list[str]) -> None:
    """Trains; every :data:`EVERY` steps records this process's memory in MB and its number of open descriptors."""
    import torch

    from benchmarks.contenders import fit
    from distrain.training.callbacks import Callback

    samples: list[tuple[int, float, int]] = []

    class RecordUsage(Callback):
        def on_step_end(self, trainer: Any) -> None:
            step = trainer.progress.step
            if step % EVERY == 0:
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                samples.append(
                    (step, pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(list(Path("/proc/self/fd").iterdir())))
                )

    torch.set_num_threads(1)
    # Few images per step, so that many steps take little time; a leak per step does not depend on them.
    fit("cnn", 2, WARMUP + steps, folder, lambda trainer: trainer.callbacks.append(RecordUsage()), *overrides)
    Path(folder, f"rank_{os.environ['RANK']}.json").write_text(json.dumps(samples))


def main() -> None:
    """Runs as the launcher, or with ``--folder`` as one rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="keys as for launch/train.py")
    arguments = parser.parse_args()
    if arguments.folder:
        rank(arguments.steps, arguments.folder, arguments.overrides)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={arguments.ranks}", __file__]
        command += ["--steps", str(arguments.steps), "--folder", folder, *arguments.overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600, check=False)
        ranks = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("rank_*"))]
    if done.returncode or len(ranks) != arguments.ranks:
        raise SystemExit(f"the training failed:\n{done.stdout}\n{done.stderr}")
    print(f"{'step':>8}" + "".join(f"{f'rank {number} MB':>14}{'open':>6}" for number in range(len(ranks))))
    for rows in zip(*ranks, strict=True):
        print(f"{rows[0][0]:8}" + "".join(f"{memory:14.1f}{opened:6}" for _, memory, opened in rows))
    grown = []
    for samples in ranks:
        warm, last = next(sample for sample in samples if sample[0] >= WARMUP), samples[-1]
        grown.append((last[1] - warm[1], last[2] - warm[2]))
    print("since warm-up: " + ", ".join(f"{memory:+.1f} MB and {opened:+} open" for memory, opened in grown))
    if any(memory >= LIMIT_MB or opened > 0 for memory, opened in grown):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
