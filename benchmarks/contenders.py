"""The contenders of benchmarks/step.py. This script runs one rank of one of them, started by torchrun.

Every contender times the same number of steps after the same warm-up, on synthetic images of CIFAR-10's shape in
memory, with Adam and one thread per rank.
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

from benchmarks.phases import PhaseTimer
from benchmarks.textbook import textbook_cnn

ROOT = Path(__file__).parent.parent
IMAGES = 8192
#: distrain's keys for each network. BatchNorm's statistics are local to each rank, as in the other contenders.
MODELS = {
    "cnn": ("model=cifar_cnn",),
    "resnet18": ("model=resnet18", "model.norm=batch", "strategy.batchnorm=local"),
}


@dataclass(frozen=True)
class BenchmarkJob:
    """What one rank has to measure.

    Attributes:
        contender: A name of :data:`CONTENDERS`.
        model: A name of :data:`MODELS`.
        share: Images per rank and step.
        warmup: Number of steps before the first timed one.
        steps: Number of timed steps.
        layout: ``contiguous`` or ``channels_last``, for contenders that support both.
        precision: ``fp32`` or ``bf16``, likewise.
        phases: Measure the phases of steps, which slows them a little.
        folder: Folder for the results ``rank_N.json``.
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


class StepTimer:
    """Seconds between the end of the warm-up and the end of the last step."""

    def __init__(self, job: BenchmarkJob, phase_timer: PhaseTimer | None) -> None:
        self.count, self.warmup, self.steps, self.phase_timer = 0, job.warmup, job.steps, phase_timer
        self.start = self.seconds = 0.0
        self.phases: dict[str, float] = {}

    def tick(self) -> bool:
        """Counts a step; returns false after the last one."""
        self.count += 1
        if self.count == self.warmup:
            self.start = time.perf_counter()
            if self.phase_timer is not None:
                self.phase_timer.restart()
        if self.count == self.warmup + self.steps:
            self.seconds = time.perf_counter() - self.start
            if self.phase_timer is not None:
                self.phases = self.phase_timer.milliseconds(self.steps)
        return self.count < self.warmup + self.steps


def network(name: str) -> nn.Module:
    """The same module that distrain trains, so that only the loops differ."""
    from distrain.cli import hydra_entry as cli
    from distrain.config.load import load_config
    from distrain.models.build import instantiate_model

    chosen = load_config(cli.compose(ROOT / "conf", "config", ["strategy=ddp", *MODELS[name]])).model
    return instantiate_model(chosen, in_channels=3, num_classes=10, image_size=(32, 32))


def data() -> tuple[Tensor, Tensor]:
    """Images float32 [N, 3, 32, 32] and labels int64 [N], the same for all contenders that use float images."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(IMAGES, 3, 32, 32, generator=generator), torch.randint(10, (IMAGES,), generator=generator)


def endless(batches: Any) -> Iterator[Any]:
    """Repeats the batches forever."""
    while True:
        yield from batches


def loop(job: BenchmarkJob, timer: StepTimer, model: nn.Module, rank: int, ranks: int) -> None:
    """The hand-written loop: fused Adam and tensors in memory."""
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

    for x, y in timer.phase_timer.time_batches(batches()) if timer.phase_timer is not None else batches():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16) if job.precision == "bf16" else contextlib.nullcontext():
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if not timer.tick():
            return


def make_model(job: BenchmarkJob) -> nn.Module:
    """The job's network in the job's layout."""
    torch.manual_seed(0)
    layout = torch.channels_last if job.layout == "channels_last" else torch.contiguous_format
    return network(job.model).to(memory_format=layout)  # type: ignore[call-overload,no-any-return]


def alone(job: BenchmarkJob, timer: StepTimer) -> None:
    """Processes that never communicate: the limit of the machine."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    model = make_model(job)
    if timer.phase_timer is not None:
        timer.phase_timer.instrument_model(model)
    # They begin together; else the first one would use the machine alone for a while.
    Path(job.folder, f"ready_{rank}").touch()
    while len(list(Path(job.folder).glob("ready_*"))) < ranks:
        time.sleep(0.01)
    loop(job, timer, model, rank, ranks)


def bare(job: BenchmarkJob, timer: StepTimer) -> None:
    """The same loop around torch's DistributedDataParallel."""
    dist.init_process_group("gloo")
    model = nn.parallel.DistributedDataParallel(make_model(job))
    if timer.phase_timer is not None:
        timer.phase_timer.instrument_ddp(model)
    loop(job, timer, model, dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()


def fit(model: str, share: int, steps: int, folder: str, prepare: Callable[[Any], None], *overrides: str) -> None:
    """The whole of ``launch/train.py`` on this rank.

    Args:
        model: A name of :data:`MODELS`.
        share: Images per rank and step.
        steps: Number of steps.
        folder: Parent of the run folder.
        prepare: Called with the trainer before it trains.
        *overrides: More configuration keys.
    """
    from distrain.cli import hydra_entry as cli
    from distrain.config.load import load_config
    from distrain.data.base import data_source
    from distrain.runtime.runtime import Runtime
    from distrain.runtime.world import World
    from distrain.training.assembly import build_trainer
    from distrain.training.run_plan import RunPlan

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
    splits = data_source(checked.data).load()
    with Runtime(checked, world) as runtime:
        trainer = build_trainer(RunPlan.resolve(checked, runtime.world), runtime, splits)
        prepare(trainer)
        trainer.fit()


def distrain(job: BenchmarkJob, timer: StepTimer, *overrides: str) -> None:
    """``launch/train.py`` with a callback that counts its steps."""
    from distrain.training.callbacks import Callback

    class CountSteps(Callback):
        def on_step_end(self, trainer: Any) -> None:
            timer.tick()

    def prepare(trainer: Any) -> None:
        trainer.callbacks.append(CountSteps())
        if timer.phase_timer is not None:
            timer.phase_timer.instrument_trainer(trainer)

    fit(job.model, job.share, job.warmup + job.steps, job.folder, prepare, *overrides)


def same_format(job: BenchmarkJob, timer: StepTimer) -> None:
    """``launch/train.py`` in the layout and precision of the bare loop."""
    distrain(job, timer, f"trainer.memory_format={job.layout}", f"trainer.precision={job.precision}")


def accelerate(job: BenchmarkJob, timer: StepTimer) -> None:
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


def lightning(job: BenchmarkJob, timer: StepTimer) -> None:
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


CONTENDERS: dict[str, Callable[[BenchmarkJob, StepTimer], None]] = {
    "alone": alone,
    "bare": bare,
    "distrain": same_format,
    "defaults": distrain,
    "lightning": lightning,
    "accelerate": accelerate,
}
#: Contenders whose phases can be measured.
INSTRUMENTED = ("alone", "bare", "distrain")


def main() -> None:
    """Runs one rank; writes its seconds, and its milliseconds by phase, to the job's folder."""
    parser = argparse.ArgumentParser()
    parser.add_argument("job", help="a BenchmarkJob as JSON")
    job = BenchmarkJob(**json.loads(parser.parse_args().job))
    torch.set_num_threads(1)
    phase_timer = PhaseTimer() if job.phases else None
    timer = StepTimer(job, phase_timer)
    if phase_timer is not None:
        phase_timer.instrument_torch()
    CONTENDERS[job.contender](job, timer)
    result = {"seconds": timer.seconds, "phases": timer.phases}
    Path(job.folder, f"rank_{os.environ['RANK']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
