"""A run may take as many steps as it likes: what one leaves behind, the next doesn't add to."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import pytest

from distrain.config.schema import Config
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.training.callbacks import Callback
from tests.garbage import cyclic_garbage
from tests.harness import run_ranks
from tests.runs import small, trainer_for

DESCRIPTORS = Path("/proc/self/fd")
#: A little before the end of an epoch, and many epochs later.
WARM, LAST = 88, 298
_LOOKS, _BETWEEN_LOOKS = 20, 0.01


def open_descriptors() -> int:
    """How many are open, but for those that a thread has open for a moment, to write status.json for example."""
    counts = []
    for _ in range(_LOOKS):
        counts.append(len(list(DESCRIPTORS.iterdir())))
        time.sleep(_BETWEEN_LOOKS)
    return min(counts)


class Inventory(Callback):
    """Counts what this process has open, and the objects that the garbage collector knows of, after two steps."""

    def __init__(self) -> None:
        self.found: list[tuple[int, int]] = []

    def on_step_end(self, trainer: Any) -> None:
        if trainer.progress.step in (WARM, LAST):
            # Its files are open until the save is complete, which may take long.
            trainer.checkpointing.saver.wait()
            gc.unfreeze()
            gc.collect()
            self.found.append((open_descriptors(), len(gc.get_objects())))


def train(config: Config) -> list[tuple[int, int]]:
    inventory = Inventory()
    with Runtime(config, World.from_environment()) as runtime:
        trainer = trainer_for(config, runtime)
        trainer.callbacks.append(inventory)
        trainer.fit()
    return inventory.found


@pytest.mark.skipif(not DESCRIPTORS.exists(), reason="needs Linux's /proc")
def test_steps_logs_epochs_and_saves_leave_no_object_and_no_descriptor(tmp_path: Path) -> None:
    options = ("strategy=ddp", "logger=tensorboard", "trainer.log_every_steps=5", "data.train_size=331")
    config = small(*options, f"trainer.max_steps={LAST}", "trainer.epochs=1000", f"run_dir={tmp_path}")
    for warm, last in run_ranks(train, 2, config):
        assert last[0] <= warm[0]
        # One object every third step would be seventy.
        assert last[1] - warm[1] < 70


class CyclicGarbage(Callback):
    """Finds what the steps after the second leave in reference cycles."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}
        self._block = cyclic_garbage()

    def on_step_end(self, trainer: Any) -> None:
        if trainer.progress.step == 2:
            self.found = self._block.__enter__()
        elif trainer.progress.step == trainer.config.trainer.max_steps:
            self._block.__exit__(None, None, None)


def garbage_of_steps(config: Config) -> dict[str, int]:
    garbage = CyclicGarbage()
    with Runtime(config, World.from_environment()) as runtime:
        trainer = trainer_for(config, runtime)
        trainer.callbacks.append(garbage)
        trainer.fit()
    return garbage.found


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (1, ("strategy=single",)),
        (2, ("strategy=ddp",)),
        (2, ("strategy=ddp", "compression=powersgd")),
        (2, ("strategy=ddp", "compression=topk")),
        (2, ("strategy=pipeline",)),
        (2, ("strategy=local_sgd",)),
        (3, ("strategy=parameter_server",)),
    ],
)
def test_steps_epochs_and_saves_leave_no_tensor_to_the_garbage_collector(
    ranks: int, options: tuple[str, ...], tmp_path: Path
) -> None:
    # Such a tensor would live on, and be freed in whichever thread the collector happens to run.
    every = ("trainer.max_steps=16", "trainer.epochs=1000", "trainer.log_every_steps=2", "checkpoint.every_steps=3")
    config = small(*options, *every, f"run_dir={tmp_path}")
    assert run_ranks(garbage_of_steps, ranks, config) == [{}] * ranks
