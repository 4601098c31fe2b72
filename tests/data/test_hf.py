"""Data sets of the Hugging Face library: its formats give the same samples, and what can't be used is refused."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distrain.data import hub_dataset
from distrain.data.base import Splits
from distrain.errors import ConfigError
from tests.data.helpers import source, write_image


@pytest.fixture(scope="module", autouse=True)
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The library, which writes into a temporary folder and asks nobody."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
        library = pytest.importorskip("datasets")
        patch.setattr(library.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.setattr(library.config, "HF_CACHE_HOME", str(tmp_path_factory.mktemp("home")))
        yield library


def picture(value: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(np.full((5, 4, 3), value, dtype=np.uint8)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def table(datasets: Any, count: int, start: int = 0, labels: Any = None, label: Any = None, **more: Any) -> Any:
    """Images of the values start, start + 1, …, of alternating classes."""
    images = [picture(start + i) for i in range(count)]
    columns = {"image": images, "label": [i % 2 for i in range(count)] if labels is None else labels}
    kinds = {"image": datasets.Image(), "label": label or datasets.ClassLabel(names=["cat", "dog"])}
    features = datasets.Features({**kinds, **{name: datasets.Image() for name in more}})
    return datasets.Dataset.from_dict({**columns, **more}, features=features)


@pytest.fixture
def places(datasets: Any, tmp_path: Path) -> dict[str, Path]:
    """The same 12 images to train on and 4 to test on, in each format."""
    train, test = table(datasets, 12), table(datasets, 4, 100)
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "disk")
    for name, part, rows in (("train", 0, range(7)), ("train", 1, range(7, 12)), ("test", 0, range(4))):
        (tmp_path / "parquet" / "data").mkdir(parents=True, exist_ok=True)
        chosen = (train if name == "train" else test).select(rows)
        chosen.to_parquet(tmp_path / "parquet" / "data" / f"{name}-0000{part}-of-00002.parquet")
    for name, count, start in (("train", 12, 0), ("test", 4, 100)):
        for i in range(count):
            pixels = np.full((5, 4, 3), start + i, dtype=np.uint8)
            write_image(tmp_path / "images" / name / ("cat", "dog")[i % 2] / f"{i:02}.png", pixels)
    return {name: tmp_path / name for name in ("disk", "parquet", "images")}


def configured(path: Path | str, **changes: Any) -> Any:
    given = {"mean": [0.5] * 3, "std": [0.5] * 3, "cache_format": "encoded"}
    settings = {"height": 5, "width": 4, "workers": 0, "val_fraction": 0.0, **given}
    return source("hf", path=str(path), **{**settings, **changes})


def load(path: Path | str, **changes: Any) -> Splits:
    splits: Splits = configured(path, **changes).load()
    return splits


def samples(splits: Splits, part: str) -> list[tuple[int, int]]:
    """Value and class of each sample, sorted."""
    split = getattr(splits, part)
    read = split.read(torch.arange(len(split)))
    return sorted(zip(read.images[:, 0, 0, 0].tolist(), read.targets.tolist(), strict=True))


@pytest.mark.parametrize("name", ["disk", "parquet", "images"])
def test_each_format_gives_the_same_samples(places: dict[str, Path], name: str) -> None:
    splits = load(places[name])
    assert splits.spec.classes == ("cat", "dog")
    assert splits.notes == ("16 images, 2 classes (train 12, test 4); columns image and label",)
    assert samples(splits, "train") == [(i, i % 2) for i in range(12)]
    assert samples(splits, "test") == [(100 + i, i % 2) for i in range(4)]


def test_pixels_and_statistics_are_cached_and_the_images_copied_once(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = load(places["disk"], cache_format="pixels", mean=None, std=None)
    assert splits.resident
    assert samples(splits, "train") == [(i, i % 2) for i in range(12)]
    assert splits.mean == pytest.approx([np.mean(range(12)) / 255] * 3)
    monkeypatch.setattr(hub_dataset, "_copy", lambda *arguments: pytest.fail("copied again"))
    assert samples(load(places["disk"]), "test") == samples(splits, "test")
    moved = places["disk"].rename(places["disk"].parent / "moved")
    with pytest.raises(pytest.fail.Exception, match="copied again"):
        load(moved, cache=str(moved.parent / "other"))


def test_kinds_of_labels(datasets: Any, tmp_path: Path) -> None:
    several = datasets.Sequence(datasets.ClassLabel(names=["red", "round", "rare"]))
    kinds: list[tuple[list[Any], Any, str, tuple[str, ...], Any]] = [
        ([3, 0, 1], datasets.Value("int64"), "class", ("0", "1", "2", "3"), [3, 0, 1]),
        (["b", "a", "b"], datasets.Value("string"), "class", ("a", "b"), [1, 0, 1]),
        ([True, False, True], datasets.Value("bool"), "class", ("0", "1"), [1, 0, 1]),
        ([0.5, -1.0, 2.0], datasets.Value("float32"), "numbers", ("label",), [[0.5], [-1.0], [2.0]]),
        ([[0, 2], [], [1]], several, "labels", ("red", "round", "rare"), [[1, 0, 1], [0, 0, 0], [0, 1, 0]]),
    ]
    for number, (labels, feature, kind, classes, targets) in enumerate(kinds):
        table(datasets, 3, labels=labels, label=feature).save_to_disk(tmp_path / str(number))
        described = configured(tmp_path / str(number))
        assert (described.describe().target, described.describe().classes) == (kind, classes)
        assert described._targets[2].tolist() == targets


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "unlabelled": ({"labels": [0, -1, 1]}, {}, r"data\.label_column=label: row 1 of the train split is -1"),
    "no value": ({"labels": [0, None, 1]}, {}, "row 1 of the train split is empty"),
    "one class": ({"labels": ["a"] * 3, "label": "string"}, {}, "has one class only, a"),
    "not finite": ({"labels": [0.0, float("nan"), 1.0], "label": "float32"}, {}, "row 1 of the train split holds nan"),
    "three image columns": (
        {"a": [None] * 3, "b": [None] * 3, "rename": {"image": "c"}},
        {},
        r"data\.image_column=null: needs the name of the column; choices: c, a, b",
    ),
    "no such column": ({}, {"label_column": "labl"}, r"data\.label_column=labl: no such column.*did you mean label\?"),
    "no such split": ({}, {"test": "validation"}, r"data\.test=validation: no such split; choices: train"),
    "one split twice": ({}, {"train": "train", "test": "train"}, r"data\.test=train: is the split for train too"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_table_that_cant_be_used_is_refused_in_one_line(datasets: Any, tmp_path: Path, name: str) -> None:
    columns, changes, problem = WRONG[name]
    rename, label = columns.get("rename", {}), columns.get("label")
    content = {key: value for key, value in columns.items() if key not in ("rename", "label")}
    made = table(datasets, 3, label=label and datasets.Value(label), **content)
    made.rename_columns(rename).save_to_disk(tmp_path / "disk")
    with pytest.raises(ConfigError) as caught:
        configured(tmp_path / "disk", **changes).describe()
    assert re.search(problem, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_image_that_is_missing_is_found_when_it_is_decoded(datasets: Any, tmp_path: Path) -> None:
    made = table(datasets, 3)
    images = [picture(0), None, picture(2)]
    kinds = datasets.Features(image=datasets.Image(), label=made.features["label"])
    datasets.Dataset.from_dict({"image": images, "label": [0, 1, 0]}, features=kinds).save_to_disk(tmp_path / "disk")
    with pytest.raises(ConfigError, match=r"can't be decoded .*data\.on_error=skip"):
        load(tmp_path / "disk", mean=None)


def test_folders_that_hold_no_data_set_are_refused_and_no_script_is_run(
    tmp_path: Path, places: dict[str, Path]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "train.parquet").symlink_to(next(places["parquet"].glob("data/train-*")))
    for name, problem in (
        ("empty", "holds neither what save_to_disk writes, nor parquet files, nor images"),
        ("script", r"holds script\.py, a script that would load it; no code of it is run"),
        ("broken", "can't be opened"),
        ("links", r"train\.parquet is a link to outside of the folder"),
        ("missing/or/else", "is neither a folder nor a name on the hub"),
    ):
        with pytest.raises(ConfigError, match=problem) as caught:
            configured(tmp_path / name).describe()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_without_a_network_a_name_on_the_hub_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import huggingface_hub

    def unreachable(*arguments: Any, **options: Any) -> Any:
        raise ConnectionError("Name or service not known\nmore")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    with pytest.raises(ConfigError, match=r"^data\.path=user/name: is no folder, and was not downloaded before; "):
        configured("user/name").describe()
    assert "the hub can't be reached (Name or service not known); using what was downloaded before" in caplog.text
    with pytest.raises(ConfigError, match=r"was not downloaded before; data\.download=false"):
        configured("user/name", download=False).describe()


def test_an_image_outside_of_the_folder_is_not_read(datasets: Any, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    write_image(secret, np.zeros((5, 4, 3), dtype=np.uint8))
    kinds = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
    rows = {"image": [{"bytes": None, "path": str(secret)}] * 2, "label": [0, 1]}
    made = datasets.Dataset.from_dict(rows, features=kinds)
    made.to_parquet(tmp_path / "made.parquet")
    (tmp_path / "set").mkdir()
    # Written without the library, which would put the image itself into the file.
    pytest.importorskip("pyarrow.parquet").write_table(made.data.table, tmp_path / "set" / "train.parquet")
    with pytest.raises(ConfigError, match=r"names an image outside of it, .*secret\.png"):
        load(tmp_path / "set")


def test_an_evaluation_downloads_nothing(tmp_path: Path) -> None:
    choice = type(configured("user/name"))
    changes = choice.changes_for_evaluation(configured("user/name")._config, None)
    assert changes["download"] is False
    assert choice.changes_for_evaluation(configured("user/name")._config, "here")["path"] == "here"


def test_the_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"^data=hf: needs the library datasets .*pip install 'distrain\[hf\]'"):
        configured(tmp_path).describe()
