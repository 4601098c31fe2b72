"""Which task fits which data."""

from __future__ import annotations

import pytest

from distrain.data.base import TARGETS
from distrain.errors import ConfigError
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


def test_data_without_names_of_classes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^task\.name: classification needs data that name their classes"):
        task_for("class", classes=0)
