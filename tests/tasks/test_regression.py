"""Metrics of task=regression are scikit-learn's, whatever pieces and ranks they are counted in."""

from __future__ import annotations

import pytest
import torch
from sklearn import metrics

from tests.tasks.helpers import count, summed_state, task_for, trained_means


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("classes", [1, 3])
def test_metrics_are_those_of_scikit_learn(classes: int, offset: float) -> None:
    task = task_for("numbers", "task=regression", classes=classes)
    generator = torch.Generator().manual_seed(2)
    targets = torch.randn(count(), classes, generator=generator) + offset
    outputs = targets + torch.randn(count(), classes, generator=generator) / 3
    state = summed_state(task, outputs, targets)
    found = task.results(state, count())
    true, predicted = targets.double().numpy(), outputs.double().numpy()
    expected = {
        "mse": metrics.mean_squared_error(true, predicted),
        "mae": metrics.mean_absolute_error(true, predicted),
        "r2": metrics.r2_score(true, predicted),
    }
    assert found == pytest.approx(expected, rel=1e-7 if offset else 1e-12)
    trained = trained_means(task, outputs, targets)
    assert trained == pytest.approx({name: found[name] for name in task.metrics}, rel=1e-5)
    each = metrics.r2_score(true, predicted, multioutput="raw_values")
    assert [row["r2"] for row in task.details(state)["numbers"]] == pytest.approx(list(each), rel=1e-7)


def test_r2_is_left_out_where_a_number_never_changes() -> None:
    task = task_for("numbers", "task=regression", classes=2)
    targets = torch.stack([torch.linspace(0, 1, count()), torch.full((count(),), 0.1)], dim=1)
    state = summed_state(task, targets + 0.5, targets)
    assert set(task.results(state, count())) == {"mse", "mae"}
    assert [row["r2"] is None for row in task.details(state)["numbers"]] == [False, True]


def test_the_best_checkpoint_has_the_lowest_mse() -> None:
    task = task_for("numbers", "task=regression")
    assert (task.score, task.higher_is_better) == ("mse", False)
    assert task.config.loss.name == "mean_squared_error"


def test_a_prediction_has_the_numbers_by_name() -> None:
    rows = task_for("numbers", "task=regression", classes=2).predict(torch.tensor([[1.5, -2.0]]), 1)
    assert rows == [{"numbers": {"a": 1.5, "b": -2.0}}]
