"""A model whose state is three times what a rank may have trains on four ranks, and can't on one."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from distrain.cli import app
from distrain.training.callbacks import Callback
from tests.harness import run_ranks
from tests.runs import small

#: Bytes that a rank may have for its data besides what it has without a model.
LIMIT = 160 << 20
LAYERS = 32
#: Inputs and outputs of a layer, so that parameters, gradients and Adam's two moments have three times the limit.
WIDTH = round((3 * LIMIT / (4 * 4) / LAYERS) ** 0.5)
MODEL = ("model=custom", f"model._target_={__name__}.Large")


class Large(nn.Sequential):
    """Many equal layers."""

    def __init__(self, in_channels: int, num_classes: int, width: int = WIDTH) -> None:
        first = nn.Linear(64 * in_channels, width)
        layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(width, width), nn.ReLU())]
        super().__init__(nn.Flatten(), first, *layers, nn.Linear(width, num_classes))


class Measure(Callback):
    """Notes the size of this process's data while it trains."""

    def __init__(self) -> None:
        self.most = 0

    def on_step_end(self, run: Any) -> None:
        self.most = max(self.most, data_bytes())


def data_bytes() -> int:
    """What RLIMIT_DATA limits."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmData:")[1].split()[0]) << 10


def train_within_limit(options: tuple[str, ...], folder: str) -> str:
    """Trains, with the limit, after a small model without it, and resumes; returns what the problem is."""
    shared = (*MODEL, "optimizer=adam", "checkpoint.background=false", "checkpoint.every_steps=1", *options)
    measure = Measure()
    with app.prepared(small(*shared, "+model.kwargs.width=8", "trainer.max_steps=2", f"run_dir={folder}/small")) as run:
        run.callbacks.append(measure)
        run.fit()
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (measure.most + LIMIT, before[1]))
    try:
        for steps in (2, 3):
            app.train(small(*shared, f"trainer.max_steps={steps}", f"run_dir={folder}/large"))
    except (RuntimeError, MemoryError) as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
    return ""


@pytest.mark.soak
def test_a_model_of_three_times_the_limit_trains_on_four_ranks_and_not_on_one(tmp_path: Path) -> None:
    assert run_ranks(train_within_limit, 4, ("strategy=fsdp",), str(tmp_path / "four"), timeout=500) == [""] * 4
    (problem,) = run_ranks(train_within_limit, 1, (), str(tmp_path / "one"), timeout=500)
    assert "memory" in problem
