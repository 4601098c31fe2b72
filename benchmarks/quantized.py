r"""What int8 and pruning cost in accuracy and gain in size and time on a CPU.

Exports the model of each run as ONNX in float32 and in int8 (``quantize=int8``). A process that does not import
distrain then reads the files, counts the right answers on all test images, and times calls with one image and with 32
in turns: one call of each file after the other, so that whatever else the machine does hits all alike. Prints one table
with the medians; the last column is the size after gzip, in which zeros take next to no room.

    distrain train data=cifar10 data.root=DATA model=resnet18 trainer.epochs=3 run_dir=RUN
    distrain train data=cifar10 data.root=DATA model=resnet18 trainer.epochs=1 init.weights=RUN prune.amount=0.8 \
        run_dir=PRUNED
    python benchmarks/quantized.py RUN PRUNED [--data-root DATA] [--threads N] [--seconds S]
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distrain.cli.run_folder import RunFolder
from distrain.data.base import data_source

ROOT = Path(__file__).parent.parent
DISTRAIN = [sys.executable, "-m", "distrain"]
#: Run in a process of its own with -I: FOLDER SECONDS THREADS FILE.onnx …
ALONE = """
import json, statistics, sys, time
import numpy, onnxruntime
folder, seconds, threads, files = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
images, labels = (numpy.load(f"{folder}/{name}.npy") for name in ("images", "labels"))
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = threads
sessions = [onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"]) for file in files]
found = []
for session in sessions:
    parts = [session.run(["class"], {"images": images[start : start + 250]})[0] for start in range(0, len(images), 250)]
    found.append({"right": int((numpy.concatenate(parts) == labels).sum())})
for size in (1, 32):
    times = [[] for _ in sessions]
    batch, end = images[:size], time.perf_counter() + seconds
    for session in sessions:
        session.run(None, {"images": batch})
    while len(times[0]) < 7 or time.perf_counter() < end:
        for session, values in zip(sessions, times):
            start = time.perf_counter()
            session.run(None, {"images": batch})
            values.append(1000 * (time.perf_counter() - start))
    for entry, values in zip(found, times):
        entry[str(size)] = [statistics.median(values), min(values), len(values)]
assert "distrain" not in sys.modules and "torch" not in sys.modules
print(json.dumps(found))
"""


def call(*command: str) -> str:
    """Runs a command; returns what it said."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, check=True, text=True, stdout=subprocess.PIPE).stdout


def save_test_images(run: Path, data_root: Path | None, folder: Path) -> int:
    """Writes the test images and labels as arrays; returns how many there are."""
    data = RunFolder.open(str(run)).config.data
    test = data_source(data if data_root is None else dataclasses.replace(data, root=str(data_root))).load().test
    samples = test.read(torch.arange(len(test)))
    np.save(folder / "images.npy", samples.images.numpy())
    np.save(folder / "labels.npy", np.asarray(samples.targets))
    return len(test)


def row(name: str, file: Path, found: dict[str, Any], count: int) -> str:
    """A line of the table."""
    size, packed = file.stat().st_size, len(gzip.compress(file.read_bytes()))
    times = "".join(f" {found[batch][0]:>9.2f}" for batch in ("1", "32"))
    return f"{name:<24} {100 * found['right'] / count:>8.2f} {size:>12,}{times} {packed:>12,}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--threads", type=int, default=1, help="threads of ONNX Runtime")
    parser.add_argument("--seconds", type=float, default=20, help="for the calls of each size")
    options = parser.parse_args()
    root = [] if options.data_root is None else [f"data_root={options.data_root}"]
    with tempfile.TemporaryDirectory() as name:
        folder, files = Path(name), {}
        count = save_test_images(options.runs[0], options.data_root, folder)
        for run in options.runs:
            for kind, keys in (("fp32", ()), ("int8", ("quantize=int8",))):
                file = folder / f"{run.name}_{kind}.onnx"
                print(call(*DISTRAIN, "export", f"run={run}", "format=onnx", f"output={file}", *keys, *root), end="")
                files[f"{run.name} {kind}"] = file
        numbers = [str(folder), str(options.seconds), str(options.threads)]
        alone = json.loads(call(sys.executable, "-I", "-c", ALONE, *numbers, *map(str, files.values())))
        calls = " and ".join(str(alone[0][batch][2]) for batch in ("1", "32"))
        print(f"\n{count:,} test images, {options.threads} thread(s), {calls} calls of each file")
        print(f"{'':<24} {'% right':>8} {'bytes':>12} {'ms for 1':>9} {'ms for 32':>9} {'bytes gzip':>12}")
        for (label, file), found in zip(files.items(), alone, strict=True):
            print(row(label, file, found, count))


if __name__ == "__main__":
    main()
