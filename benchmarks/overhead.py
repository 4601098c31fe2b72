"""What distrain costs beyond a bare loop, beside its peers, in one run.

The seed's CIFAR-10 CNN under data parallelism, one thread a rank, float32, on synthetic CIFAR-10-shaped images that lie
in memory, for global batches of 32 and 256:

=============  =======================================================================================================
``bare``       a hand-written loop: DistributedDataParallel, fused Adam, tensors in memory, nothing else
``distrain``   ``launch/train.py strategy=ddp`` with its defaults: metrics, accounting, logs, time shares
``contiguous`` the same with ``trainer.memory_format=contiguous``, the layout of the others
``lightning``  a LightningModule and Trainer with a DataLoader, as Lightning's documentation does it
``accelerate`` ``accelerator.prepare`` with a DataLoader, as Accelerate's documentation does it
=============  =======================================================================================================

Every contender times the same steps after the same warm-up in a process group of its own; contenders take turns,
several rounds, so that a machine whose speed drifts treats all alike. Prints medians and ratios as a table, and as JSON
with ``--json``.

    python benchmarks/overhead.py [--rounds 5] [--steps 200] [--ranks 2] [--batches 32 256] [--only bare distrain]
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parent.parent
IMAGES = 8192
WARMUP = 30


def cnn() -> nn.Module:
    """The seed's CIFAR-10 CNN as its readers would write it: 122,570 parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def data() -> tuple[Tensor, Tensor]:
    """Images float32 [N, 3, 32, 32] and labels int64 [N], the same for all contenders that hold floats."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(IMAGES, 3, 32, 32, generator=generator), torch.randint(10, (IMAGES,), generator=generator)


class Timer:
    """Seconds between the end of the warm-up and the end of the last step."""

    def __init__(self, steps: int) -> None:
        self.count, self.steps = 0, steps
        self.start = self.seconds = 0.0

    def tick(self) -> bool:
        """Counts a step; false once all were taken."""
        self.count += 1
        if self.count == WARMUP:
            self.start = time.perf_counter()
        if self.count == WARMUP + self.steps:
            self.seconds = time.perf_counter() - self.start
            return False
        return True


def endless(batches: Any) -> Iterator[Any]:
    """Epoch after epoch."""
    while True:
        yield from batches


def bare(share: int, steps: int) -> float:
    """Images/s of this rank's share of the work times the number of ranks, as for all contenders."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    images, labels = data()
    model = nn.parallel.DistributedDataParallel(cnn())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    rank, ranks, timer = dist.get_rank(), dist.get_world_size(), Timer(steps)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(IMAGES)[rank::ranks]
        for start in range(0, len(order) - share + 1, share):
            picked = order[start : start + share]
            yield images[picked], labels[picked]

    while True:
        for x, y in batches():
            optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            if not timer.tick():
                dist.destroy_process_group()
                return timer.seconds


def accelerate(share: int, steps: int) -> float:
    """As https://huggingface.co/docs/accelerate/basic_tutorials/migration shows."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = cnn()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loader = DataLoader(TensorDataset(*data()), batch_size=share, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    loss_function, timer = nn.CrossEntropyLoss(), Timer(steps)
    model.train()
    for x, y in endless(loader):
        optimizer.zero_grad()
        accelerator.backward(loss_function(model(x), y))
        optimizer.step()
        if not timer.tick():
            break
    accelerator.end_training()
    return timer.seconds


def lightning(share: int, steps: int) -> float:
    """As https://lightning.ai/docs/pytorch/stable/starter/introduction.html shows."""
    import lightning as pl

    timer = Timer(steps)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = cnn()

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            x, y = batch
            loss = nn.functional.cross_entropy(self.model(x), y)
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

        def on_train_batch_end(self, *_: Any) -> None:
            timer.tick()

    loader = DataLoader(TensorDataset(*data()), batch_size=share, shuffle=True, drop_last=True)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=int(os.environ["WORLD_SIZE"]),
            strategy="ddp",
            max_steps=WARMUP + steps,
            max_epochs=-1,
            default_root_dir=folder,
            enable_model_summary=False,
        )
        trainer.fit(Module(), loader)
    return timer.seconds


def distrain(share: int, steps: int, *overrides: str) -> float:
    """The whole of ``launch/train.py``, timed from outside its steps by a callback."""
    from distrain import app, cli, config
    from distrain.callbacks import Callback
    from distrain.runtime import Runtime, World

    timer, world = Timer(steps), World.from_environment()

    class Watch(Callback):
        def on_step_end(self, trainer: Any) -> None:
            timer.tick()

    checked = config.load(
        cli.compose(
            ROOT / "conf",
            "config",
            [
                "strategy=ddp",
                "model=cifar_cnn",
                "data=synthetic",
                f"data.train_size={IMAGES}",
                "data.val_fraction=0",
                f"data.batch_size={share * world.size}",
                f"trainer.max_steps={WARMUP + steps}",
                "trainer.epochs=1000000",
                "checkpoint.every_epochs=1000000",
                f"run_dir={os.environ['BENCHMARK_FOLDER']}",
                *overrides,
            ],
        )
    )
    splits = app.source(checked).load()
    with Runtime(checked, world) as runtime:
        trainer = app.build_trainer(checked, runtime, splits)
        trainer.callbacks.append(Watch())
        trainer.fit()
    return timer.seconds


def contiguous(share: int, steps: int) -> float:
    """Distrain in the layout of the others."""
    return distrain(share, steps, "trainer.memory_format=contiguous")


CONTENDERS: dict[str, Callable[[int, int], float]] = {
    "bare": bare,
    "distrain": distrain,
    "contiguous": contiguous,
    "lightning": lightning,
    "accelerate": accelerate,
}


def measure(name: str, batch: int, arguments: argparse.Namespace) -> float:
    """One contender's images/s, in fresh processes under torchrun."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={arguments.ranks}", __file__]
        command += ["--contender", name, "--batches", str(batch), "--steps", str(arguments.steps), "--result", folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "BENCHMARK_FOLDER": f"{folder}/run"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
        results = [float(json.loads(path.read_text())) for path in Path(folder).glob("rank_*.json")]
    if done.returncode or len(results) != arguments.ranks:
        raise SystemExit(f"{name} failed:\n{done.stdout}\n{done.stderr}")
    # The job is as fast as its slowest rank.
    return float(batch * arguments.steps / max(results))


def main() -> None:
    """Runs as the launcher, or with ``--contender`` as one rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--contender", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        torch.set_num_threads(1)
        share = arguments.batches[0] // int(os.environ["WORLD_SIZE"])
        rank = os.environ["RANK"]
        seconds = CONTENDERS[arguments.contender](share, arguments.steps)
        (arguments.result / f"rank_{rank}.json").write_text(json.dumps(seconds))
        return
    report: dict[str, dict[str, float]] = {}
    for batch in arguments.batches:
        rates: dict[str, list[float]] = {name: [] for name in arguments.only}
        for _ in range(arguments.rounds):
            for name in arguments.only:
                rates[name].append(measure(name, batch, arguments))
        medians = {name: statistics.median(values) for name, values in rates.items()}
        report[str(batch)] = medians
        print(f"\nglobal batch {batch}, {arguments.ranks} ranks, {arguments.rounds} rounds of {arguments.steps} steps")
        print(f"{'':12} {'images/s':>10} {'min':>8} {'max':>8} {'÷ bare':>8}")
        for name, median in medians.items():
            ratio = f"{median / medians['bare']:8.2f}" if "bare" in medians else ""
            print(f"{name:12} {median:10,.0f} {min(rates[name]):8,.0f} {max(rates[name]):8,.0f} {ratio}", flush=True)
        peers = [medians[name] for name in ("lightning", "accelerate") if name in medians]
        if peers and "distrain" in medians:
            print(f"distrain ÷ the faster peer: {medians['distrain'] / max(peers):.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
