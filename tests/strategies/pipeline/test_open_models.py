"""Models of torchvision and timm in stages: each is trained as in one process, and its weights fit its own class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import distrain
from distrain.cli import app
from tests.harness import run_ranks
from tests.runs import relative_difference, small, train_on_rank
from tests.strategies.pipeline import open_models
from tests.strategies.pipeline.stages import BOUND, compare, model_options

pytestmark = pytest.mark.soak
pytest.importorskip("torchvision")
pytest.importorskip("timm")


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("kind", open_models.MODELS)
def test_a_model_in_stages_equals_one_process(kind: str, ranks: int, tmp_path: Path) -> None:
    has_batchnorm = open_models.MODELS[kind][1]
    # BatchNorm normalises each microbatch by itself: with a single one it is equal too.
    more = (*open_models.options(kind), *(("strategy.microbatches=1",) if has_batchnorm else ()))
    largest = compare(tmp_path, open_models.__name__, [kind], ranks, ["1f1b", "interleaved_zero_bubble"], *more)
    print(f"{kind}, {ranks} ranks: {largest[kind]:.1e}")


@pytest.mark.parametrize("kind", ["tv_densenet", "timm_efficientnet", "timm_vit", "unet"])
def test_a_run_in_stages_continues_under_ddp_and_its_export_fits_the_class(kind: str, tmp_path: Path) -> None:
    def train(run: Any, ranks: int, steps: int, *strategy: str) -> Any:
        common = (
            *open_models.options(kind),
            *model_options(open_models.__name__, kind),
            "trainer.precision=fp64",
            "scheduler=constant",
        )
        adam = (
            "optimizer.eps=1e-3",
            "trainer.precision=fp64",
            "trainer.epochs=100",
            f"trainer.max_steps={steps}",
            *strategy,
        )
        return run_ranks(run, ranks, small(*common, *adam))[0]

    pipeline = ("strategy=pipeline", "strategy.microbatches=1", f"run_dir={tmp_path}/moved")
    expected = train(train_on_rank, 1, 9, f"run_dir={tmp_path}/whole")["model"]
    train(app.train, 2, 3, *pipeline)
    train(app.train, 2, 6, "strategy=ddp", f"run_dir={tmp_path}/moved")
    found = train(train_on_rank, 3, 9, *pipeline, "strategy.stages=3")["model"]
    difference = relative_difference(found, expected)
    print(f"{kind}, moved: {difference:.1e}")
    assert difference <= BOUND
    file = distrain.export(tmp_path / "moved", tmp_path / "model.safetensors", allow=[open_models.__name__])
    model = open_models.build(3, 4, kind)
    model.load_state_dict(safetensors.torch.load_file(file))
    # The file has float32.
    assert all(torch.equal(value, found[name].to(value.dtype)) for name, value in model.state_dict().items())
