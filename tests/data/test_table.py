"""A table with a row for each image becomes splits, with targets of every kind, like a folder of the same images."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distrain.data import decode_processes
from distrain.data.base import DataSpec, Splits
from distrain.data.manifest import data_changes, data_manifest
from distrain.errors import ConfigError
from tests.data.helpers import decode_here, source, write_image

COUNT = 12
LABELS = ["cat", "dog", "ant"]


def load(path: Path, **changes: object) -> Splits:
    return source("table", root=str(path), height=5, width=4, **{"workers": 1, **changes}).load()


def write(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]], separator: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator).writerows([header, *rows])
    return path


def values(splits: Splits, part: str) -> list[int]:
    """Value of each image's pixels."""
    split = getattr(splits, part)
    return split.pick(torch.arange(len(split)))[:, 0, 0, 0].tolist()  # type: ignore[no-any-return]


def by_image(splits: Splits) -> dict[int, Any]:
    """Target of each image by its number, over all splits."""
    found: dict[int, Any] = {}
    for part in ("train", "val", "test"):
        numbers = [value // 10 for value in values(splits, part)]
        found |= dict(zip(numbers, getattr(splits, part).targets.tolist(), strict=True))
    return found


@pytest.fixture(autouse=True)
def decoding_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_processes, "run", decode_here)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with images 0.png to 11.png, whose pixels are ten times their number."""
    for number in range(COUNT):
        write_image(tmp_path / f"{number}.png", np.full((5, 4, 3), 10 * number, dtype=np.uint8))
    return tmp_path


def equal(first: Splits, second: Splits) -> None:
    assert (first.spec, first.mean, first.std) == (second.spec, second.mean, second.std)
    for part in ("train", "val", "test"):
        ours, theirs = getattr(first, part), getattr(second, part)
        places = torch.arange(len(theirs))
        assert ours.pick(places).equal(theirs.pick(places))
        assert ours.targets.equal(theirs.targets)


@pytest.mark.parametrize("limit", [0, 100])
@pytest.mark.parametrize("with_test", [True, False])
def test_a_table_gives_what_the_folder_of_the_same_images_gives(tree: Path, with_test: bool, limit: int) -> None:
    root = tree if with_test else tree / "train"
    rows = [
        (path.relative_to(root), path.parent.name, path.parent.parent.name if with_test else "train")
        for part in ("train", "test")[: 1 + with_test]
        for path in sorted((tree / part).rglob("*.png"))
    ]
    keys = {"memory_limit_mb": limit, "test_fraction": 0.2}
    folder = source("image_folder", root=str(root), height=5, width=4, workers=1, **keys).load()
    table = load(write(root / "all.csv", ["path", "label", "split"], rows), **keys)
    equal(table, folder)
    assert table.resident is (limit > 0)
    # Both use one cache.
    assert len([path for path in (root / ".distrain-cache").iterdir() if not path.name.startswith(".")]) == 1


@pytest.mark.parametrize(
    ("suffix", "separator", "end", "mark"),
    [
        (".csv", ",", "\n", ""),
        (".csv", ";", "\r\n", "\ufeff"),
        (".CSV", "\t", "\r", ""),
        (".tsv", "\t", "\r\n\r\n", ""),
        (".txt", ",", "\n\n", "\ufeff"),
    ],
)
def test_text_is_read_in_every_usual_form(images: Path, suffix: str, separator: str, end: str, mark: str) -> None:
    rows = [("path", " label ", "note")]
    rows += [(f" {number}.png", LABELS[number % 3], '"anything,; quoted"') for number in range(COUNT)]
    path = images / f"table{suffix}"
    path.write_bytes((mark + "".join(separator.join(row) + end for row in rows)).encode())
    splits = load(path)
    assert splits.spec == DataSpec(3, 5, 4, ("ant", "cat", "dog"))
    assert by_image(splits) == {number: [1, 2, 0][number % 3] for number in range(COUNT)}


def test_parquet_is_read_as_text_is(images: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {
        "path": [f"{number}.png" for number in range(COUNT)],
        "label": [*range(COUNT)],
        "split": ["train"] * COUNT,
    }
    columns["large"] = [number > 5 for number in range(COUNT)]
    path = images / "a.parquet"
    parquet.write_table(pyarrow.table(columns), path)
    assert by_image(load(path, test_fraction=0.5)) == {number: number for number in range(COUNT)}
    splits = load(path, label_column="large", target="labels")
    assert by_image(splits) == {number: [int(number > 5)] for number in range(COUNT)}
    path.write_bytes(b"PAR1" + path.read_bytes()[8:])
    with pytest.raises(ConfigError, match=r"a\.parquet: (is no Parquet file, or a damaged one|.*can't be read)"):
        load(path)


def test_rows_belong_to_the_parts_that_they_name(images: Path) -> None:
    parts = ["train", "Training", "VAL", "validation", "test", "valid"]
    rows = [(f"{number}.png", number % 2, parts[number % 6]) for number in range(COUNT)]
    path = write(images / "a.csv", ["file", "y", "fold"], rows)
    keys = {"path_column": "file", "label_column": "y", "split_column": "fold"}
    splits = load(path, **keys)
    assert [values(splits, part) for part in ("train", "val", "test")] == [
        [0, 10, 60, 70], [20, 30, 50, 80, 90, 110], [40, 100],
    ]  # fmt: skip
    assert splits.notes == (
        "12 images in a.csv (train 4, val 6, test 2)",
        "y: one of 2 classes an image, by what the cells look like (data.target=… says otherwise)",
    )
    ignored = load(path, **{**keys, "split_column": None}, val_fraction=0)
    assert (len(ignored.train), len(ignored.test)) == (11, 1)


FLAGS = np.random.default_rng(0).integers(0, 2, (COUNT, 3))
FLAGS[:2] = np.eye(3)[:2]
NUMBERS = np.random.default_rng(1).normal(size=(COUNT, 2)).astype(np.float32)
TEXTS = ["|".join(name for name, flag in zip(LABELS, flags, strict=True) if flag) for flags in FLAGS]
SORTED = FLAGS[:, [2, 0, 1]]


@pytest.mark.parametrize(
    ("columns", "keys", "kind", "classes", "expected"),
    [
        ({"label": [10 - number for number in range(COUNT)]}, {}, "class", [str(n) for n in range(-1, 11)],
         [11 - number for number in range(COUNT)]),
        ({"label": [LABELS[n % 3] for n in range(COUNT)]}, {"classes": ["dog", "cat", "ant"]}, "class",
         ["dog", "cat", "ant"], [[1, 0, 2][n % 3] for n in range(COUNT)]),
        (dict(zip("abc", FLAGS.T.tolist(), strict=True)), {"label_column": ["a", "b", "c"]}, "labels",
         ["a", "b", "c"], FLAGS.tolist()),
        ({"a": ["True" if flag else "false" for flag in FLAGS[:, 0]]}, {"label_column": "a", "target": "labels"},
         "labels", ["a"], FLAGS[:, :1].tolist()),
        ({"label": TEXTS}, {"label_separator": "|"}, "labels", ["ant", "cat", "dog"], SORTED.tolist()),
        ({"label": [text.replace("|", ", ") for text in TEXTS]}, {"label_separator": ","}, "labels",
         ["ant", "cat", "dog"], SORTED.tolist()),
        ({"label": [text.replace("|", " ") for text in TEXTS]}, {"label_separator": " ", "classes": LABELS}, "labels",
         LABELS, FLAGS.tolist()),
        ({"label": NUMBERS[:, 0].tolist()}, {}, "numbers", ["label"], NUMBERS[:, :1].tolist()),
        ({"x": NUMBERS[:, 0].tolist(), "y": NUMBERS[:, 1].tolist()}, {"label_column": ["x", "y"]}, "numbers",
         ["x", "y"], NUMBERS.tolist()),
        ({"age": [str(number) for number in range(COUNT)]}, {"label_column": "age", "target": "numbers",
         "classes": ["years"]}, "numbers", ["years"], [[float(number)] for number in range(COUNT)]),
    ],
)  # fmt: skip
def test_targets_of_every_kind_arrive_as_they_are_in_the_table(
    images: Path, columns: dict[str, Any], keys: dict[str, Any], kind: str, classes: list[str], expected: list[Any]
) -> None:
    rows = list(zip([f"{number}.png" for number in range(COUNT)], *columns.values(), strict=True))
    # With val_fraction=0 and a split column of its own, every row is for training, and each class is known.
    rows = [(*row, "train") for row in rows] + [(*rows[0], "test")]
    splits = load(write(images / "a.csv", ["path", *columns, "split"], rows), **keys, val_fraction=0)
    assert (splits.spec.target, splits.spec.classes) == (kind, tuple(classes))
    types = {"class": torch.int64, "labels": torch.uint8, "numbers": torch.float32}
    assert splits.train.targets.equal(torch.tensor(expected, dtype=types[kind]))
    assert splits.test.targets.equal(splits.train.targets[:1])
    assert splits.notes[-1] == "images for training that are also in test: 1, such as 0.png"


def write_mask(path: Path, values: Any, mode: str = "L") -> None:
    path.parent.mkdir(exist_ok=True)
    mask = Image.fromarray(np.asarray(values, dtype=np.uint8))
    if mode == "P":
        mask.putpalette([number * 7 % 256 for number in range(768)])
    mask.convert({"P": "P"}.get(mode, mode)).save(path)


@pytest.mark.parametrize("mode", ["L", "P", "RGB"])
def test_masks_are_cropped_and_resized_with_their_images_by_nearest_pixels(images: Path, mode: str) -> None:
    rng = np.random.default_rng(0)
    masks = rng.choice([0, 1, 2, 255], (COUNT, 10, 12))
    for number, mask in enumerate(masks):
        write_image(images / f"{number}.png", np.repeat(mask[..., None], 3, axis=2).astype(np.uint8))
        write_mask(images / "masks" / f"{number}.png", mask, mode)
    rows = [(f"{number}.png", f"masks/{number}.png") for number in range(COUNT)]
    splits = load(write(images / "a.csv", ["path", "label"], rows), classes=["ground", "crack", "hole"])
    assert splits.spec == DataSpec(3, 5, 4, ("ground", "crack", "hole"), target="mask")
    for part in (splits.train, splits.val, splits.test):
        assert part.targets.dtype == torch.uint8
        assert part.targets.shape == (len(part), 5, 4)
        assert set(part.targets.unique().tolist()) <= {0, 1, 2, 255}
    # 8 of the 12 columns are kept, from the third on, and of each square of 2x2 pixels one.
    squares = masks[:, :, 2:10].reshape(COUNT, 5, 2, 4, 2).swapaxes(2, 3).reshape(COUNT, 5, 4, 4)
    found = torch.cat([part.targets for part in (splits.train, splits.val, splits.test)]).numpy()
    order = [
        next(number for number in range(COUNT) if (squares[number] == mask[..., None]).any(-1).all()) for mask in found
    ]
    assert sorted(order) == [*range(COUNT)]


def test_black_and_white_masks_have_two_classes(images: Path) -> None:
    for number in range(COUNT):
        write_mask(images / "masks" / f"{number}.png", np.full((5, 4), 255 * (number % 2)))
    rows = [(f"{number}.png", f"masks/{number}.png") for number in range(COUNT)]
    splits = load(write(images / "a.csv", ["path", "label"], rows), classes=["ground", "crack"])
    assert by_image(splits) == {number: [[number % 2] * 4] * 5 for number in range(COUNT)}


def test_files_that_are_missing_or_broken_are_left_out_if_the_user_says_so(
    images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(COUNT):
        write_mask(images / "masks" / f"{number}.png", np.full((5, 4), number % 2))
    (images / "1.png").unlink()
    (images / "2.png").write_bytes(b"no image")
    (images / "masks" / "3.png").unlink()
    (images / "masks" / "4.png").write_bytes(b"no image")
    rows = [(f"{number}.png", f"masks/{number}.png") for number in range(COUNT)]
    path = write(images / "a.csv", ["path", "label"], rows)
    splits = load(path, classes=["a", "b"], on_error="skip")
    assert sorted(by_image(splits)) == [0, *range(5, COUNT)]
    assert "skipped 2 of 12 rows whose file is missing" in caplog.text
    assert "skipped 2 of 10 masks that can't be decoded" in caplog.text


def test_paths_may_be_absolute_below_the_folder_of_images(
    images: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    rows = [(images / f"x/../{number}.png", number % 2) for number in range(6)]
    rows += [(Path(f"./{number}.png"), number % 2) for number in range(6, COUNT)]
    (images / "x").mkdir()
    splits = load(write(elsewhere / "a.csv", ["path", "label"], rows), images=str(images))
    assert by_image(splits) == {number: number % 2 for number in range(COUNT)}


def test_changed_and_added_rows_are_noticed(images: Path) -> None:
    rows = [(f"{number}.png", number % 2) for number in range(COUNT)]
    path = write(images / "a.csv", ["path", "label"], rows)
    before = data_manifest(load(path, mean=[0, 0, 0], std=[1, 1, 1]))

    def changes(rows: list[Any]) -> list[str]:
        write(path, ["path", "label"], rows)
        return data_changes(before, data_manifest(load(path, mean=[0, 0, 0], std=[1, 1, 1])))

    assert changes(rows) == []
    assert changes([*rows[:-1], (rows[-1][0], 0)]) == [
        "samples or targets have other values, and are as many as before"
    ]
    assert changes(rows[::-1]) == ["samples or targets have other values, and are as many as before"]
    assert changes([*rows, *rows[:4]])[0] == "samples.train: 10 → 13"


def test_an_evaluation_elsewhere_looks_for_the_images_beside_the_table(images: Path) -> None:
    data = source("table", root=str(images / "a.csv"), images="/not/here")
    config = data._config  # type: ignore[attr-defined]
    assert type(data).changes_for_evaluation(config, "/new/b.csv") == {
        "root": "/new/b.csv", "cache": None, "images": None,
    }  # fmt: skip
    here = dataclasses.replace(config, images=str(images))
    assert "images" not in type(data).changes_for_evaluation(here, "/new/b.csv")


@pytest.mark.parametrize("choice", ["table", "numpy"])
def test_an_evaluation_numbers_the_classes_as_the_run_did(images: Path, choice: str) -> None:
    """Also if the files that it reads lack some of them."""
    names = [LABELS[number % 2] for number in range(COUNT)]
    path = write(images / "a.csv", ["path", "label"], [(f"{number}.png", name) for number, name in enumerate(names)])
    if choice == "numpy":
        path = images / "a.npz"
        np.savez(path, x=np.zeros((COUNT, 5, 4, 3), np.uint8), y=np.array(names))
    data = source(choice, root=str(path))
    spec = DataSpec(3, 5, 4, ("dog", "bird", "cat"))
    config = data._config  # type: ignore[attr-defined]
    changed = dataclasses.replace(config, **type(data).changes_for_classes(config, spec))
    assert data.describe().classes == ("cat", "dog")
    assert type(data)(changed).describe().classes == ("dog", "bird", "cat")  # type: ignore[call-arg]
    assert type(data)(changed).load().train.targets.unique().tolist() == [0, 2]  # type: ignore[call-arg]
