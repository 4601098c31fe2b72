"""Whether exported programs, and predictions by several ranks, give what ``distrain evaluate`` and one process give.

For a run on CIFAR-10, with all 10,000 test images:

1. exports the run's model as ONNX and for ``torch.export``, and reads both again in a process that does not import
   distrain. Counts the right answers there and by ``distrain evaluate``, and compares the probabilities.
2. writes the images as PNG files and predicts for them by one process; then by three ranks, which are killed by SIGKILL
   half way and started again. Compares the bytes of the two files.

    distrain train data=cifar10 model=cifar_cnn trainer.epochs=2 data.root=DATA run_dir=RUN
    python benchmarks/exported.py RUN [--data-root DATA] [--images N]
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from distrain.cli.run_folder import RunFolder
from distrain.data.base import data_source

ROOT = Path(__file__).parent.parent
DISTRAIN = [sys.executable, "-m", "distrain"]
#: Run in a process of its own with -I: FOLDER FILE.onnx FILE.pt2.
ALONE = """
import json, sys
import numpy, onnxruntime, torch
images, labels = (numpy.load(f"{sys.argv[1]}/{name}.npy") for name in ("images", "labels"))
session = onnxruntime.InferenceSession(sys.argv[2])
program = torch.export.load(sys.argv[3]).module()
found = {"onnxruntime": [], "torch.export": []}
for start in range(0, len(images), 500):
    batch = images[start : start + 500]
    found["onnxruntime"].append(session.run(["probabilities"], {"images": batch})[0])
    found["torch.export"].append(program(torch.from_numpy(batch))["probabilities"].numpy())
assert "distrain" not in sys.modules
both = {name: numpy.concatenate(parts) for name, parts in found.items()}
print(json.dumps({
    "right": {name: int((each.argmax(1) == labels).sum()) for name, each in both.items()},
    "difference": float(abs(both["onnxruntime"] - both["torch.export"]).max()),
}))
numpy.save(f"{sys.argv[1]}/probabilities.npy", both["onnxruntime"])
"""


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def call(*command: str) -> str:
    """Runs a command; returns what it said."""
    return subprocess.run(command, env=environment(), check=True, text=True, stdout=subprocess.PIPE).stdout


def start_ranks(count: int, *command: str) -> list[subprocess.Popen[bytes]]:
    """Starts ranks on this host as a launcher would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    sizes = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [
        subprocess.Popen(command, env=environment(**meeting, **sizes, RANK=str(rank), LOCAL_RANK=str(rank)))
        for rank in range(count)
    ]


def compare_programs(run: Path, data_root: Path | None, folder: Path, limit: int | None) -> None:
    """The first part; leaves the images in the folder."""
    root = [] if data_root is None else [f"data_root={data_root}"]
    for name, file in (("onnx", "m.onnx"), ("torch_export", "m.pt2")):
        print(call(*DISTRAIN, "export", f"run={run}", f"format={name}", f"output={folder / file}", *root), end="")
    evaluated = json.loads(call(*DISTRAIN, "evaluate", f"run={run}", "output=-", *root))
    data = RunFolder.open(str(run)).config.data
    test = data_source(data if data_root is None else dataclasses.replace(data, root=str(data_root))).load().test
    samples = test.read(torch.arange(limit or len(test)))
    np.save(folder / "images.npy", samples.images.numpy())
    np.save(folder / "labels.npy", np.asarray(samples.targets))
    alone = json.loads(
        call(sys.executable, "-I", "-c", ALONE, str(folder), str(folder / "m.onnx"), str(folder / "m.pt2"))
    )
    print(f"right answers: evaluate {evaluated['correct']} of {evaluated['count']}; without distrain {alone['right']}")
    print(f"largest difference of a probability between the two programs: {alone['difference']:.1e}")


def compare_predictions(run: Path, folder: Path) -> None:
    """The second part."""
    images = np.load(folder / "images.npy")
    (folder / "png").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / "png" / f"{number:05}.png")
    command = [*DISTRAIN, "predict", f"run={run}", f"input={folder / 'png'}", "device=cpu"]
    print(call(*command, f"output={folder / 'one.csv'}"), end="")
    parts = folder / "three.csv.parts"
    half = len(images) // 64 // 2
    ranks = start_ranks(3, *command, f"output={folder / 'three.csv'}")
    while all(rank.poll() is None for rank in ranks) and len(list(parts.glob("part_*"))) < half:
        time.sleep(0.02)
    for rank in ranks:
        rank.kill()
        rank.wait()
    print(f"killed with {len(list(parts.glob('part_*')))} parts finished")
    codes = [rank.wait() for rank in start_ranks(3, *command, f"output={folder / 'three.csv'}")]
    assert codes == [0, 0, 0]
    same = (folder / "one.csv").read_bytes() == (folder / "three.csv").read_bytes()
    with (folder / "one.csv").open(newline="") as file:
        predicted = np.array([float(row["probability"]) for row in csv.DictReader(file)])
    largest = abs(np.load(folder / "probabilities.npy").max(1) - predicted).max()
    print(f"largest difference of a probability between ONNX Runtime and distrain predict: {largest:.1e}")
    print(f"three ranks, killed half way and started again, give {'the same file as one' if same else 'ANOTHER FILE'}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--images", type=int, help="only the first N test images, for a quick look")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare_programs(options.run, options.data_root, Path(folder), options.images)
        compare_predictions(options.run, Path(folder))


if __name__ == "__main__":
    main()
