"""Metrics of task=segmentation are scikit-learn's, whatever pieces and ranks they are counted in."""

from __future__ import annotations

import pytest
import torch
from sklearn import metrics
from torch import Tensor

from distrain.data.base import IGNORED
from distrain.errors import ConfigError
from distrain.tasks.base import Task
from tests.tasks.helpers import count, summed_state, task_for, trained_means

CLASSES = 4


@pytest.fixture(scope="module")
def task() -> Task:
    return task_for("mask", "task=segmentation", "model=dilated_cnn", classes=CLASSES)


@pytest.fixture(scope="module")
def split() -> tuple[Tensor, Tensor]:
    """Outputs and masks; class 2 occurs nowhere and is predicted, class 3 neither; two masks are partly unknown."""
    generator = torch.Generator().manual_seed(3)
    outputs = torch.randn(count(), CLASSES, 5, 6, generator=generator)
    outputs[:, 3] = -9
    masks = torch.randint(2, (count(), 5, 6), generator=generator, dtype=torch.uint8)
    masks[0] = masks[7, 2:] = masks[8, :, 1] = IGNORED
    return outputs, masks


def test_metrics_are_those_of_scikit_learn(task: Task, split: tuple[Tensor, Tensor]) -> None:
    outputs, masks = split
    state = summed_state(task, outputs, masks)
    known = masks != IGNORED
    true, predicted = masks[known].numpy(), outputs.argmax(1)[known].numpy()
    assert task.results(state, count()) == pytest.approx(
        {
            "pixel_accuracy": metrics.accuracy_score(true, predicted),
            "mean_iou": metrics.jaccard_score(true, predicted, average="macro"),
        },
        rel=1e-12,
    )
    rows = task.details(state)["classes"]
    ious = metrics.jaccard_score(true, predicted, average=None)
    assert [row["iou"] for row in rows[:3]] == pytest.approx(list(ious), rel=1e-12)
    assert rows[3]["iou"] is rows[3]["accuracy"] is rows[2]["accuracy"] is None
    recalls = metrics.recall_score(true, predicted, average=None, labels=[0, 1])
    assert [row["accuracy"] for row in rows[:2]] == pytest.approx(list(recalls), rel=1e-12)
    assert [row["pixels"] for row in rows] == [int((true == c).sum()) for c in range(CLASSES)]
    confusion = metrics.confusion_matrix(true, predicted, labels=range(CLASSES))
    assert (state["confusion"].numpy() == confusion).all()


def test_training_measures_the_mean_over_images_of_the_right_share_of_known_pixels(
    task: Task, split: tuple[Tensor, Tensor]
) -> None:
    outputs, masks = split
    shares = [
        float((o.argmax(0)[m != IGNORED] == m[m != IGNORED]).double().mean()) if (m != IGNORED).any() else 0.0
        for o, m in zip(outputs, masks, strict=True)
    ]
    assert trained_means(task, *split)["pixel_accuracy"] == pytest.approx(sum(shares) / count(), rel=1e-6)


def test_the_count_is_the_samples_also_where_no_pixel_is_known(task: Task, split: tuple[Tensor, Tensor]) -> None:
    loss, samples = task.loss(split[0][:2], split[1][:2])
    alone, _ = task.loss(split[0][1:2], split[1][1:2])
    assert samples == 2
    torch.testing.assert_close(loss, alone)


def test_a_prediction_has_a_mask_and_the_pixels_of_each_class(task: Task, split: tuple[Tensor, Tensor]) -> None:
    outputs = split[0][:2].double()
    rows, masks = task.predict(outputs, 1), task.masks(outputs)
    assert masks is not None
    assert masks.dtype == torch.uint8
    assert [sum(row["pixels"].values()) for row in rows] == [30, 30]
    assert rows[1]["pixels"]["b"] == int((masks[1] == 1).sum())


def test_views_are_averaged_where_their_pixels_lie_in_the_image() -> None:
    task = task_for("mask", "task=segmentation", "trainer.test_views=flip", classes=3)
    images = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(task.evaluate(lambda view: 2 * view, images), 2 * images)


def test_views_that_move_pixels_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^trainer\.test_views=flip_translate: moves the pixels"):
        task_for("mask", "task=segmentation", "trainer.test_views=flip_translate")
