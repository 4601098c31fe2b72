"""Runs that distrain 0.1 saved, at commit 6a35ce4, are read by this one.

Two ranks trained ten steps with a checkpoint after the sixth: one run by a pipeline, one by ddp with PowerSGD, whose
residuals and factors lie in each rank's file. ``expected.json`` and ``expected.safetensors`` hold what that commit came
to, the latter the small tensors of the model. On one machine the steps are repeated bit for bit; another one's kernels
may round differently, hence the tolerance.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from distrain.cli import evaluate, export, hydra_entry, predict
from distrain.config.load import load_config, load_settings
from tests.harness import run_ranks
from tests.runs import CONF, train_on_rank

SAVED = Path(__file__).parent / "saved_runs"
RUNS = ("pipeline", "powersgd")


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of a saved run."""
    copy: Path = shutil.copytree(SAVED / request.param, tmp_path / request.param)
    return copy


def resume(content: dict[str, Any]) -> dict[str, Any]:
    return train_on_rank(load_config(content))


def test_it_is_resumed_on_the_same_ranks_as_it_would_have_gone_on(run: Path) -> None:
    content = yaml.safe_load((run / "config.yaml").read_text())
    content["run_dir"] = str(run)
    first, *_ = run_ranks(resume, 2, content)
    expected = json.loads((run / "expected.json").read_text())
    for key, value in expected.items():
        assert first["summary"][key] == pytest.approx(value, rel=1e-5), key
    tensors: dict[str, Tensor] = load_file(run / "expected.safetensors")
    for name, tensor in tensors.items():
        torch.testing.assert_close(first["model"][name], tensor, rtol=1e-4, atol=1e-6)


def test_it_is_resumed_by_another_strategy_on_another_number_of_ranks(run: Path) -> None:
    content = yaml.safe_load((run / "config.yaml").read_text())
    content |= {"run_dir": str(run), "strategy": {"name": "single"}, "compression": {"name": "none"}}
    (only,) = run_ranks(resume, 1, content)
    assert only["summary"]["steps"] == 10
    assert only["summary"]["samples"] == json.loads((run / "expected.json").read_text())["samples"]


def test_commands_read_it(run: Path, tmp_path: Path) -> None:
    def composed(schema: type[Any], command: str, *overrides: str) -> Any:
        return load_settings(schema, hydra_entry.compose(CONF, command, [f"run={run}", *overrides]))

    found = evaluate.run(composed(evaluate.EvaluateSettings, "evaluate"))
    assert (found["step"], found["count"]) == (6, 31)
    assert found["correct"] == sum(entry["correct"] for entry in found["classes"])
    Image.fromarray(np.full((8, 8), 100, dtype=np.uint8)).save(tmp_path / "image.png")
    output = f"output={tmp_path / 'out.json'}"
    predict.run(composed(predict.PredictSettings, "predict", f"input={tmp_path / 'image.png'}", output))
    (prediction,) = json.loads((tmp_path / "out.json").read_text())
    assert prediction["class"] in {"0", "1", "2", "3"}
    output = f"output={tmp_path / 'model.safetensors'}"
    exported = load_file(export.run(composed(export.ExportSettings, "export", output)))
    parts = [load_file(file) for file in sorted((run / "checkpoints" / "step_00000006").glob("model*.safetensors"))]
    for name, tensor in {name: tensor for part in parts for name, tensor in part.items()}.items():
        assert exported[name].equal(tensor)
