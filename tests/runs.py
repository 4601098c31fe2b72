"""Small runs that tests share: their configuration, and what a rank does with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from distrain import app, cli, config
from distrain.config import Config
from distrain.runtime import Runtime, World

CONF = Path(__file__).parent.parent / "conf"
LAUNCH = Path(__file__).parent.parent / "launch"

#: Small and fast, with everything that doesn't divide: 47 images to train on, batches of 10, a ragged last one of 7.
SMALL = (
    "data=synthetic",
    "data.channels=3",
    "data.height=8",
    "data.width=8",
    "data.classes=4",
    "data.train_size=53",
    "data.val_fraction=0.1",
    "data.test_size=31",
    "data.batch_size=10",
    "data.eval_batch_size=7",
    "logger=none",
    "trainer.progress=off",
    "runtime.threads=1",
    "runtime.timeout_seconds=30",
    "runtime.setup_timeout_seconds=30",
)


def compose(*overrides: str) -> Config:
    """The checked configuration of a command line."""
    return config.load(cli.compose(CONF, "config", list(overrides)))


def small(*overrides: str) -> Config:
    """The same for a small synthetic run."""
    return compose(*SMALL, *overrides)


def train_on_rank(configuration: Config) -> dict[str, Any]:
    """What a rank of a test run does: trains as ``launch/train.py`` would.

    Returns:
        ``summary`` and, as plain tensors, ``model`` after the last step.
    """
    world = World.from_environment()
    app.check(configuration, world)
    splits = app.source(configuration).load()
    with Runtime(configuration, world) as runtime:
        trainer = app.build_trainer(configuration, runtime, splits)
        summary = trainer.fit()
        model = {name: tensor.detach().clone() for name, tensor in trainer.strategy.model_state().items()}
    return {"summary": summary, "model": model, "run_dir": str(runtime.run_dir)}


def relative_difference(model: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """Largest over the tensors of ‖difference‖ / ‖reference‖, in double precision."""
    assert model.keys() == reference.keys()
    worst = 0.0
    for name, expected in reference.items():
        difference = (model[name].double() - expected.double()).norm()
        worst = max(worst, float(difference / expected.double().norm().clamp(min=1e-30)))
    return worst
