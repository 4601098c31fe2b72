"""Two runs are equal if their last checkpoints are equal bit for bit and they have logged the same steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distrain.checkpoint import writer as checkpoint_writer
from distrain.tools.chaos import compare
from tests.checkpoint.helpers import progress, state


def save(run: Path, model: Tensor, moment: Tensor | None = None, step: int = 10) -> Path:
    tensors = {"model": {"a": torch.zeros(2), "w": model}}
    tensors["optimizer"] = {"w/moment": torch.ones(2) if moment is None else moment}
    checkpoint_writer.save(run / "checkpoints", {**state(), **tensors}, progress(step))
    return run


def test_equal_bits_are_equal_even_for_nan(tmp_path: Path) -> None:
    weights = torch.tensor([1.0, float("nan")])
    assert compare.checkpoint_differences(save(tmp_path / "a", weights), save(tmp_path / "b", weights.clone())) == []


@pytest.mark.parametrize(
    "other",
    [
        torch.tensor([1.0, -0.0]),
        torch.tensor([1.0, 0.0], dtype=torch.float64),
        torch.tensor([[1.0, 0.0]]),
        torch.nextafter(torch.tensor([1.0, 0.0]), torch.tensor(2.0)),
    ],
)
def test_different_bits_types_or_shapes_differ(other: Tensor, tmp_path: Path) -> None:
    found = compare.checkpoint_differences(save(tmp_path / "a", torch.tensor([1.0, 0.0])), save(tmp_path / "b", other))
    assert found == ["1 tensors of the model differ, w among them"]


def test_optimizer_state_is_compared_too(tmp_path: Path) -> None:
    weights = torch.zeros(2)
    found = compare.checkpoint_differences(save(tmp_path / "a", weights), save(tmp_path / "b", weights, torch.zeros(2)))
    assert found == ["1 tensors of the optimizer differ, w/moment among them"]


def test_runs_with_another_last_step_or_no_checkpoint_differ(tmp_path: Path) -> None:
    first = save(tmp_path / "a", torch.zeros(2))
    assert compare.checkpoint_differences(first, save(tmp_path / "b", torch.zeros(2), step=20)) == [
        "ended with step_00000020, not with step_00000010"
    ]
    assert compare.checkpoint_differences(first, tmp_path / "none") == ["there is no checkpoint"]


def log(run: Path, *steps: int, end: str = "") -> Path:
    run.mkdir()
    rows = [json.dumps({"kind": "step", "step": step}) + "\n" for step in steps]
    (run / "metrics.jsonl").write_text("".join(rows) + end)
    return run


def test_surplus_and_missing_rows_are_counted(tmp_path: Path) -> None:
    expected = log(tmp_path / "expected", 2, 4, 6)
    assert compare.log_differences(expected, log(tmp_path / "same", 2, 4, 6), lossy=False) == []
    doubled = compare.log_differences(expected, log(tmp_path / "doubled", 2, 4, 4, 6, 4), lossy=False)
    assert doubled == ["metrics.jsonl has 1 rows too many, step 4 first"]
    lost = compare.log_differences(expected, log(tmp_path / "lost", 2), lossy=False)
    assert lost == ["metrics.jsonl has 2 rows too few, step 4 first"]


def test_a_full_disk_excuses_missing_and_truncated_rows_but_not_surplus_ones(tmp_path: Path) -> None:
    expected = log(tmp_path / "expected", 2, 4, 6)
    cut = log(tmp_path / "cut", 2, 6, end='{"kind": "st')
    assert compare.log_differences(expected, cut, lossy=True) == []
    assert len(compare.log_differences(expected, cut, lossy=False)) == 2
    doubled = log(tmp_path / "doubled", 2, 2)
    assert compare.log_differences(expected, doubled, lossy=True) == ["metrics.jsonl has 1 rows too many, step 2 first"]
