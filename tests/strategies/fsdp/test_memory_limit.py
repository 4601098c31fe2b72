"""A model whose state is three times what a rank may have trains on four ranks, and can't on one."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from distrain.cli import app
from distrain.errors import ConfigError, Failed
from distrain.training.callbacks import Callback
from tests.harness import run_ranks
from tests.runs import small

#: Bytes that a rank may have for its data besides what it has without a model.
LIMIT = 320 << 20
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


def options_of(*more: str) -> tuple[str, ...]:
    return (*MODEL, "optimizer=adam", "checkpoint.background=false", "checkpoint.every_steps=1", *more)


def measured(options: tuple[str, ...], folder: str) -> int:
    """Trains a small model; returns the most data of this process."""
    measure = Measure()
    with app.prepared(small(*options, "+model.kwargs.width=8", "trainer.max_steps=2", f"run_dir={folder}")) as run:
        run.callbacks.append(measure)
        run.fit()
    return measure.most


def train_within_limit(options: tuple[str, ...], limit: int, folder: str) -> str:
    """Trains with a limit of this process's data; returns what the problem is."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        app.train(small(*options, f"run_dir={folder}"))
    except (ConfigError, Failed, MemoryError, RuntimeError) as error:
        return str(error)
    return ""


def train(ranks: int, options: tuple[str, ...], folder: Path) -> list[str]:
    """Trains two steps and then, in other processes, one more; returns what the ranks' problems are."""
    limit = max(run_ranks(measured, ranks, options, str(folder / "small"))) + LIMIT
    for steps in (2, 3):
        more = (*options, f"trainer.max_steps={steps}")
        problems = run_ranks(train_within_limit, ranks, more, limit, str(folder / "large"), timeout=500)
        if any(problems):
            break
    return problems


@pytest.mark.soak
def test_a_model_of_three_times_the_limit_trains_on_four_ranks_and_not_on_one(tmp_path: Path) -> None:
    assert train(4, options_of("strategy=fsdp"), tmp_path / "four") == [""] * 4
    (problem,) = train(1, options_of(), tmp_path / "one")
    assert "memory" in problem
