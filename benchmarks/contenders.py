"""The loops that benchmarks/step.py compares; one rank of one of them, started by torchrun.

Every contender times the same steps after the same warm-up, on synthetic CIFAR-10-shaped images that lie in memory,
under Adam with one thread a rank.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.phases import Timeline
from benchmarks.textbook import textbook_cnn

ROOT = Path(__file__).parent.parent
IMAGES = 8192
#: What a network is in distrain's words. BatchNorm's statistics are each rank's own, as the others have them.
MODELS = {
    "cnn": ("model=cifar_cnn",),
    "resnet18": ("model=resnet18", "model.norm=batch", "strategy.batchnorm=local"),
}


@dataclass(frozen=True)
class Job:
    """What one rank does.

    Attributes:
        contender: Which loop.
        model: Which network, of :data:`MODELS`.
        share: Images a rank works on in a step.
        warmup: Steps before the first that is timed.
        steps: How many are timed.
        layout: ``contiguous`` or ``channels_last``, for those who have a choice.
        precision: ``fp32`` or ``bf16``, likewise.
        phases: Watch where the time goes, which costs some.
        folder: Where results go, ``rank_N.json``.
    """

    contender: str
    model: str
    share: int
    warmup: int
    steps: int
    layout: str
    precision: str
    phases: bool
    folder: str


class Timer:
    """Seconds between the end of the warm-up and the end of the last step."""

    def __init__(self, job: Job, timeline: Timeline | None) -> None:
        self.count, self.warmup, self.steps, self.timeline = 0, job.warmup, job.steps, timeline
        self.start = self.seconds = 0.0
        self.phases: dict[str, float] = {}

    def tick(self) -> bool:
        """Counts a step; false once all were taken."""
        self.count += 1
        if self.count == self.warmup:
            self.start = time.perf_counter()
            if self.timeline is not None:
                self.timeline.restart()
        if self.count == self.warmup + self.steps:
            self.seconds = time.perf_counter() - self.start
            if self.timeline is not None:
                self.phases = self.timeline.milliseconds(self.steps)
        return self.count < self.warmup + self.steps


def network(name: str) -> nn.Module:
    """The very module that distrain trains, so that only the loops around it differ."""
    from distrain.cli import hydra_entry as cli
    from distrain.config.load import load_config
    from distrain.models.build import instantiate_model

    chosen = load_config(cli.compose(ROOT / "conf", "config", ["strategy=ddp", *MODELS[name]])).model
    return instantiate_model(chosen, in_channels=3, num_classes=10, image_size=(32, 32))


def data() -> tuple[Tensor, Tensor]:
    """Images float32 [N, 3, 32, 32] and labels int64 [N], the same for all contenders that hold floats."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(IMAGES, 3, 32, 32, generator=generator), torch.randint(10, (IMAGES,), generator=generator)


def endless(batches: Any) -> Iterator[Any]:
    """Epoch after epoch."""
    while True:
        yield from batches


def loop(job: Job, timer: Timer, model: nn.Module, rank: int, ranks: int) -> None:
    """The hand-written loop: fused Adam, tensors in memory, nothing else."""
    images, labels = data()
    if job.layout == "channels_last":
        images = images.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            order = torch.randperm(IMAGES)[rank::ranks]
            for start in range(0, len(order) - job.share + 1, job.share):
                picked = order[start : start + job.share]
                yield images[picked], labels[picked]

    for x, y in timer.timeline.drawn(batches()) if timer.timeline is not None else batches():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16) if job.precision == "bf16" else contextlib.nullcontext():
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if not timer.tick():
            return


def made(job: Job) -> nn.Module:
    """The network in the layout of the job."""
    torch.manual_seed(0)
    layout = torch.channels_last if job.layout == "channels_last" else torch.contiguous_format
    return network(job.model).to(memory_format=layout)  # type: ignore[call-overload,no-any-return]


def alone(job: Job, timer: Timer) -> None:
    """Processes that never talk: what the machine can compute."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    model = made(job)
    if timer.timeline is not None:
        timer.timeline.watch_model(model)
    # They begin together, or the first would have the machine for itself.
    Path(job.folder, f"ready_{rank}").touch()
    while len(list(Path(job.folder).glob("ready_*"))) < ranks:
        time.sleep(0.01)
    loop(job, timer, model, rank, ranks)


def bare(job: Job, timer: Timer) -> None:
    """The same loop around torch's DistributedDataParallel."""
    dist.init_process_group("gloo")
    model = nn.parallel.DistributedDataParallel(made(job))
    if timer.timeline is not None:
        timer.timeline.watch_ddp(model)
    loop(job, timer, model, dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()


def fit(model: str, share: int, steps: int, folder: str, watch: Callable[[Any], None], *overrides: str) -> None:
    """The whole of ``launch/train.py`` on this rank.

    Args:
        model: Of :data:`MODELS`.
        share: Images a rank works on in a step.
        steps: How many to take.
        folder: Where the run folder is made.
        watch: Is given the trainer before it trains.
        *overrides: What else is said on the command line.
    """
    from distrain.cli import hydra_entry as cli
    from distrain.config.load import load_config
    from distrain.runtime.runtime import Runtime
    from distrain.runtime.world import World
    from distrain.training.assembly import build_trainer
    from distrain.training.run_plan import RunPlan, data_source

    world = World.from_environment()
    checked = load_config(
        cli.compose(
            ROOT / "conf",
            "config",
            [
                "strategy=ddp",
                *MODELS[model],
                "data=synthetic",
                f"data.train_size={IMAGES}",
                "data.test_size=64",
                "data.val_fraction=0",
                f"data.batch_size={share * world.size}",
                "runtime.threads=1",
                f"trainer.max_steps={steps}",
                "trainer.epochs=1000000",
                "checkpoint.every_epochs=1000000",
                f"run_dir={folder}/run",
                *overrides,
            ],
        )
    )
    splits = data_source(checked).load()
    with Runtime(checked, world) as runtime:
        trainer = build_trainer(RunPlan.resolve(checked, runtime.world), runtime, splits)
        watch(trainer)
        trainer.fit()


def distrain(job: Job, timer: Timer, *overrides: str) -> None:
    """``launch/train.py``, timed from outside its steps by a callback."""
    from distrain.training.callbacks import Callback

    class Watch(Callback):
        def on_step_end(self, trainer: Any) -> None:
            timer.tick()

    def watch(trainer: Any) -> None:
        trainer.callbacks.append(Watch())
        if timer.timeline is not None:
            timer.timeline.watch_trainer(trainer)

    fit(job.model, job.share, job.warmup + job.steps, job.folder, watch, *overrides)


def alike(job: Job, timer: Timer) -> None:
    """Distrain in the layout and precision of the bare loop."""
    distrain(job, timer, f"trainer.memory_format={job.layout}", f"trainer.precision={job.precision}")


def accelerate(job: Job, timer: Timer) -> None:
    """As https://huggingface.co/docs/accelerate/basic_tutorials/migration shows."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = textbook_cnn() if job.model == "cnn" else network(job.model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loader = DataLoader(TensorDataset(*data()), batch_size=job.share, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    loss_function = nn.CrossEntropyLoss()
    model.train()
    for x, y in endless(loader):
        optimizer.zero_grad()
        accelerator.backward(loss_function(model(x), y))
        optimizer.step()
        if not timer.tick():
            break
    accelerator.end_training()


def lightning(job: Job, timer: Timer) -> None:
    """As https://lightning.ai/docs/pytorch/stable/starter/introduction.html shows."""
    import lightning as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = textbook_cnn() if job.model == "cnn" else network(job.model)

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            x, y = batch
            loss = nn.functional.cross_entropy(self.model(x), y)
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

        def on_train_batch_end(self, *_: Any) -> None:
            timer.tick()

    loader = DataLoader(TensorDataset(*data()), batch_size=job.share, shuffle=True, drop_last=True)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=int(os.environ["WORLD_SIZE"]),
            strategy="ddp",
            max_steps=job.warmup + job.steps,
            max_epochs=-1,
            default_root_dir=folder,
            enable_model_summary=False,
        )
        trainer.fit(Module(), loader)


CONTENDERS: dict[str, Callable[[Job, Timer], None]] = {
    "alone": alone,
    "bare": bare,
    "distrain": alike,
    "defaults": distrain,
    "lightning": lightning,
    "accelerate": accelerate,
}
#: Those whose steps are taken apart.
WATCHED = ("alone", "bare", "distrain")


def main() -> None:
    """Runs as one rank and leaves its seconds, and milliseconds a phase, in the job's folder."""
    parser = argparse.ArgumentParser()
    parser.add_argument("job", help="a Job as JSON")
    job = Job(**json.loads(parser.parse_args().job))
    torch.set_num_threads(1)
    timeline = Timeline() if job.phases else None
    timer = Timer(job, timeline)
    if timeline is not None:
        timeline.watch_torch()
    CONTENDERS[job.contender](job, timer)
    result = {"seconds": timer.seconds, "phases": timer.phases}
    Path(job.folder, f"rank_{os.environ['RANK']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
