"""Which task fits which data."""

from __future__ import annotations

import pytest
import torch

from distrain.data.base import TARGETS, Images
from distrain.errors import ConfigError
from distrain.tasks.base import Evaluation
from tests.tasks.helpers import task_for

TASKS = {"class": "classification", "labels": "multilabel", "numbers": "regression", "mask": "segmentation"}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("needed", TARGETS)
def test_a_task_takes_its_kind_of_targets_and_names_the_task_for_another_kind(target: str, needed: str) -> None:
    if target == needed:
        assert task_for(target, f"task={TASKS[target]}").target == target
        return
    with pytest.raises(ConfigError) as error:
        task_for(target, f"task={TASKS[needed]}")
    assert str(error.value).startswith(f"task.name={TASKS[needed]}: needs ")
    other = f", or data.target={needed} if they are no classes" if target == "class" else ""
    assert str(error.value).endswith(f"; type task={TASKS[target]}{other}")


@pytest.mark.parametrize(
    ("target", "names"), [("labels", ["labels"]), ("numbers", ["numbers"]), ("mask", ["classes", "confusion_matrix"])]
)
def test_figures_show_each_label_number_or_class(target: str, names: list[str]) -> None:
    task = task_for(target, f"task={TASKS[target]}")
    inputs = torch.zeros(2, 3, 5, 6, dtype=torch.uint8)
    targets = torch.ones(2, *((5, 6) if target == "mask" else (4,)), dtype=torch.uint8)
    state = task.metric_state(torch.device("cpu"))
    task.update_state(state, torch.rand(2, *task.output_shape), targets)
    drawn = task.figures(Evaluation(0.5, 2, {}, state, None), Images(inputs, targets))
    assert sorted(drawn) == names
    (axes,) = drawn[names[0]].axes
    assert len({row for row, _ in axes.tables[0].get_celld()}) == 1 + 4


def test_data_without_names_of_classes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^task\.name: classification needs data that name their classes"):
        task_for("class", classes=0)
