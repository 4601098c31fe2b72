"""Metrics of task=multilabel are scikit-learn's, whatever pieces and ranks they are counted in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics

from distrain.errors import ConfigError
from tests.tasks.helpers import count, summed_state, task_for, trained_means


@pytest.mark.parametrize("threshold", [0.5, 0.8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_metrics_are_those_of_scikit_learn(threshold: float, dtype: torch.dtype) -> None:
    task = task_for("labels", "task=multilabel", f"task.threshold={threshold}", classes=5)
    generator = torch.Generator().manual_seed(1)
    outputs = torch.randn(count(), 5, generator=generator).mul_(2).to(dtype)
    targets = torch.randint(2, (count(), 5), generator=generator, dtype=torch.uint8)
    targets[:, 3] = 0
    outputs[:, 3] = -5
    state = summed_state(task, outputs, targets)
    found = task.results(state, count())
    true, predicted = targets.numpy(), (outputs.float().sigmoid() >= threshold).numpy().astype(np.uint8)
    assert found == pytest.approx(
        {
            "label_accuracy": 1 - metrics.hamming_loss(true, predicted),
            "exact_match": metrics.accuracy_score(true, predicted),
            "macro_f1": metrics.f1_score(true, predicted, average="macro", zero_division=0),
            "micro_f1": metrics.f1_score(true, predicted, average="micro"),
        },
        rel=1e-12,
    )
    trained = trained_means(task, outputs, targets)
    assert trained == pytest.approx({name: found[name] for name in task.metrics}, rel=1e-6)
    precision, recall, f1, support = metrics.precision_recall_fscore_support(true, predicted, zero_division=0)
    for index, row in enumerate(task.details(state)["labels"]):
        assert row["label"] == "abcde"[index]
        assert row["count"] == support[index]
        assert row["predicted"] == predicted[:, index].sum()
        assert (row["precision"] or 0, row["recall"] or 0, row["f1"]) == pytest.approx(
            (precision[index], recall[index], f1[index]), rel=1e-12
        )
    # A label that neither occurs nor is predicted has no precision and no recall.
    assert (row := task.details(state)["labels"][3])["precision"] is row["recall"] is None


def test_the_best_checkpoint_has_the_highest_macro_f1() -> None:
    task = task_for("labels", "task=multilabel")
    assert (task.score, task.higher_is_better) == ("macro_f1", True)
    assert task.validated == ("label_accuracy", "exact_match", "macro_f1")


def test_a_prediction_names_the_labels_and_gives_every_probability() -> None:
    task = task_for("labels", "task=multilabel", classes=3)
    first, second = task.predict(torch.tensor([[1.0, -1.0, 0.0], [-2.0, -2.0, -2.0]], dtype=torch.float64), 1)
    assert first["labels"] == ["a", "c"]
    assert first["probabilities"] == pytest.approx({"a": 0.7310585786300049, "b": 0.2689414213699951, "c": 0.5})
    assert second["labels"] == []


def test_binary_cross_entropy_is_the_loss_unless_another_one_is_chosen() -> None:
    assert task_for("labels", "task=multilabel").config.loss.name == "binary_cross_entropy"
    assert task_for("labels", "task=multilabel", "loss=focal").config.loss.name == "focal"


def test_class_weights_of_the_data_change_the_loss_and_not_the_count() -> None:
    task, outputs = task_for("labels", "task=multilabel", classes=3), torch.zeros(5, 3)
    targets = torch.zeros(5, 3, dtype=torch.uint8)
    before, _ = task.loss(outputs, targets)
    task.set_class_weights([2.0, 2.0, 2.0])
    after, samples = task.loss(outputs, targets)
    torch.testing.assert_close(after, 2 * before)
    assert samples == 5


def test_class_weights_are_refused_where_the_loss_has_its_own_or_takes_none() -> None:
    with pytest.raises(ConfigError, match=r"^data\.balance=loss: chooses loss\.class_weights, and they are given"):
        task_for("labels", "task=multilabel", "loss.class_weights=[1,2,3]", classes=3).check_class_weights()
    with pytest.raises(ConfigError, match=r"^data\.balance=loss: loss=huber takes no class weights; choices: none, s"):
        task_for("numbers", "task=regression", "loss=huber").set_class_weights([1.0])
