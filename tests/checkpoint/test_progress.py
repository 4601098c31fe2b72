from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import pytest

from distrain.checkpoint.progress import Progress


def test_saved_progress_is_read_back() -> None:
    saved = Progress(step=7, epoch=1, epoch_sums=[0.5, 3.0, 20.0], train_loss=1, best_score=0.5, best_step=5)
    assert Progress.read(json.loads(json.dumps(asdict(saved))), 1) == saved
    assert math.isnan(Progress.read({"train_loss": math.nan}, 1).train_loss or 0.0), "of an epoch of left out updates"


def test_missing_field_has_its_default() -> None:
    assert Progress.read({"step": 3}, 1) == Progress(step=3)


def test_field_names_of_the_first_release_are_read() -> None:
    assert Progress.read({"val_accuracy": 0.25, "best_accuracy": 0.5}, 1) == Progress(val_score=0.25, best_score=0.5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", "7"), ("step", -1), ("step", True), ("step", None), ("step", 1.5), ("best_step", []),
        ("train_loss", "nan"), ("epoch_sums", [1.0, 2.0]), ("epoch_sums", [1.0, 2.0, "3"]), ("epoch_sums", 0.0),
    ],
)  # fmt: skip
def test_value_of_a_wrong_type_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"progress\.{name}="):
        Progress.read({name: value}, 1)


def test_unknown_field_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"progress\.steps is unknown"):
        Progress.read({"steps": 7}, 1)
