"""What a run says of its data, and how a later start's data are compared with it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from distrain.data.manifest import data_changes, data_manifest
from distrain.files.writing import to_json
from tests.data.helpers import source

NOW: dict[str, Any] = {
    "channels": 1,
    "height": 8,
    "width": 8,
    "classes": [str(number) for number in range(9)],
    "mean": [0.5],
    "std": [0.25],
    "samples": {"train": 90, "val": 10, "test": 20},
}


def test_data_that_are_loaded_again_have_not_changed() -> None:
    first, second = (data_manifest(source("synthetic", train_size=90, test_size=20).load()) for _ in range(2))
    assert data_changes(json.loads(to_json(first)), second) == []
    assert first["samples"]["train"] > first["samples"]["val"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"height": 9, "channels": 3}, ["channels: 3 → 1", "height: 9 → 8"]),
        ({"samples": {"train": 80, "val": 10, "test": 19}}, ["samples.train: 80 → 90", "samples.test: 19 → 20"]),
        ({"classes": ["a", *NOW["classes"][1:]]}, ["class 0: a → 0"]),
        (
            {"classes": NOW["classes"][::-1]},
            [f"class {n}: {8 - n} → {n}" for n in (0, 1, 2, 3, 5)] + ["3 more classes"],
        ),
        ({"classes": []}, ["number of classes: 0 → 9"]),
        ({"mean": [0.51239]}, ["mean: [0.5124] → [0.5]"]),
        # Digits that tell the two apart.
        ({"std": [0.2500001]}, ["std: [0.2500001] → [0.25]"]),
    ],
)
def test_each_entry_that_differs_is_said(changes: dict[str, Any], said: list[str]) -> None:
    assert data_changes({**NOW, **changes}, NOW) == said


def test_what_an_older_release_did_not_write_is_not_compared() -> None:
    assert data_changes({}, NOW) == []
    assert data_changes({"samples": {"val": 11}}, NOW) == ["samples.val: 11 → 10"]
