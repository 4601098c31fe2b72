"""Arrays of NumPy become splits: by the usual names and shapes, in memory or as maps; wrong ones are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from distrain.data.base import DataSpec, Splits
from distrain.data.manifest import data_changes, data_manifest
from tests.data.helpers import source

Array = npt.NDArray[Any]
COUNT = 20
#: 20 images of 6x5 pixels; pixel values say the image.
PIXELS = np.repeat(np.arange(COUNT, dtype=np.uint8), 30).reshape(COUNT, 6, 5)
CLASSES = np.arange(COUNT) % 3
DRAWS = np.random.default_rng(0)
FLAGS = DRAWS.integers(0, 2, (COUNT, 4))
FLAGS[0] = 1
NUMBERS = DRAWS.normal(size=(COUNT, 2))
MASKS = DRAWS.integers(0, 4, (COUNT, 6, 5))


def write(path: Path, arrays: dict[str, Array]) -> Path:
    """An .npz file, or a folder of .npy files if the path has no suffix."""
    if path.suffix:
        np.savez(path, **arrays)  # type: ignore[arg-type]
    else:
        path.mkdir(exist_ok=True)
        for name, array in arrays.items():
            np.save(path / name, array)
    return path


def load(path: Path, **changes: object) -> Splits:
    return source("numpy", root=str(path), **changes).load()


def samples(splits: Splits) -> dict[int, Any]:
    """The target of each image, by the value of the image's pixels, over all splits."""
    found: dict[int, Any] = {}
    for part in (splits.train, splits.val, splits.test):
        pixels = part.pick(torch.arange(len(part)))
        assert pixels.flatten(1).amin(1).equal(pixels.flatten(1).amax(1))
        found |= dict(zip(pixels[:, 0, 0, 0].tolist(), part.targets.tolist(), strict=True))
    return found


@pytest.mark.parametrize("suffix", [".npz", ""])
@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("x_train", "y_train"),
        ("X_train", "Y_train"),
        ("train_images", "train_labels"),
        ("training-x", "targets.training"),
        ("X", "y"),
        ("images", "labels"),
        ("data", "target"),
        ("arr_0", "arr_1"),
    ],
)
def test_arrays_are_found_by_their_usual_names(tmp_path: Path, images: str, labels: str, suffix: str) -> None:
    splits = load(write(tmp_path / f"a{suffix}", {images: PIXELS, labels: CLASSES}))
    assert splits.spec == DataSpec(1, 6, 5, ("0", "1", "2"))
    assert samples(splits) == dict(enumerate(CLASSES.tolist()))
    assert (len(splits.train), len(splits.val), len(splits.test), splits.resident) == (16, 2, 2, True)


def test_arrays_of_each_part_and_those_that_the_user_names_are_used(tmp_path: Path) -> None:
    arrays: dict[str, Array] = {
        "x_train": PIXELS[:9],
        "y_train": CLASSES[:9],
        "x_valid": PIXELS[9:12],
        "y_valid": CLASSES[9:12],
    }
    arrays |= {"secret": PIXELS[12:], "kinds": CLASSES[12:], "notes": NUMBERS}
    names = {"test_images": "secret", "test_labels": "kinds"}
    splits = load(write(tmp_path / "a.npz", arrays), arrays=names)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (9, 3, 8)
    assert splits.test.pick(torch.arange(8))[:, 0, 0, 0].tolist() == [*range(12, 20)]
    assert splits.notes == (
        "9 samples to train on, 3 for validation, 8 to test",
        "y_train, y_valid, kinds: one of 3 classes a sample, by their shape and type (data.target=… says otherwise)",
        "arrays that are not used: notes",
    )


@pytest.mark.parametrize("limit", [0, 100])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("channels", [1, 3])
def test_both_layouts_are_recognised_in_memory_and_as_maps(
    tmp_path: Path, channels: int, dtype: Any, limit: int
) -> None:
    nchw = np.repeat(PIXELS[:, None], channels, axis=1).astype(dtype)
    first = load(write(tmp_path / "nchw", {"x": nchw, "y": CLASSES}), memory_limit_mb=limit)
    last = load(write(tmp_path / "nhwc", {"x": nchw.transpose(0, 2, 3, 1), "y": CLASSES}), memory_limit_mb=limit)
    assert (
        first.spec == last.spec == DataSpec(channels, 6, 5, ("0", "1", "2"), "uint8" if dtype is np.uint8 else "float")
    )
    assert first.resident is last.resident is (limit > 0)
    places = torch.arange(len(first.train))
    assert first.train.pick(places).equal(last.train.pick(places))
    assert first.train.pick(places).dtype == torch.from_numpy(np.zeros(1, dtype)).dtype
    assert samples(first) == samples(last) == dict(enumerate(CLASSES.tolist()))
    assert (first.mean, first.std) == (last.mean, last.std)


def test_a_layout_that_shapes_dont_tell_is_as_the_user_says(tmp_path: Path) -> None:
    path = write(tmp_path / "a", {"x": np.repeat(PIXELS[..., None], 2, axis=3), "y": CLASSES})
    assert load(path, layout="nhwc").spec.channels == 2
    assert load(path, layout="nchw").spec == DataSpec(6, 5, 2, ("0", "1", "2"))


def test_16_bits_are_scaled_to_1_and_how_to_normalise_is_said(tmp_path: Path) -> None:
    splits = load(write(tmp_path / "a.npz", {"x": PIXELS.astype(np.uint16) * 3449, "y": CLASSES}))
    whole = torch.cat([part.pick(torch.arange(len(part))) for part in (splits.train, splits.val, splits.test)])
    assert whole.dtype == torch.float32
    assert sorted(whole[:, 0, 0, 0].tolist()) == pytest.approx([value * 3449 / 65535 for value in range(COUNT)])
    assert (splits.mean, splits.std) == ((0.0,), (1.0,))
    assert splits.notes[2].startswith("x is not normalised; data.mean=[0.5] data.std=[0.3035] give it mean 0")


@pytest.mark.parametrize(
    ("targets", "kind", "classes", "expected"),
    [
        (CLASSES[:, None].astype(np.uint8), "class", ("0", "1", "2"), CLASSES),
        (CLASSES > 0, "class", ("0", "1"), CLASSES > 0),
        (np.eye(3, dtype=np.uint8)[CLASSES], "class", ("0", "1", "2"), CLASSES),
        (np.array(["cat", "dog", "ant"])[CLASSES], "class", ("ant", "cat", "dog"), np.array([1, 2, 0])[CLASSES]),
        (FLAGS, "labels", ("0", "1", "2", "3"), FLAGS),
        (FLAGS.astype(bool), "labels", ("0", "1", "2", "3"), FLAGS),
        (NUMBERS, "numbers", ("0", "1"), NUMBERS),
        (NUMBERS[:, 0].astype(np.float32), "numbers", ("0",), NUMBERS[:, :1]),
        (MASKS, "mask", ("0", "1", "2", "3"), MASKS),
        (MASKS[:, None].astype(np.uint8), "mask", ("0", "1", "2", "3"), MASKS),
        ((MASKS > 1)[..., None], "mask", ("0", "1"), MASKS > 1),
        ((MASKS > 1) * np.uint8(255), "mask", ("0", "1"), MASKS > 1),
        (np.where(MASKS == 3, 255, MASKS), "mask", ("0", "1", "2"), np.where(MASKS == 3, 255, MASKS)),
    ],
)
def test_the_kind_of_targets_is_that_of_shape_and_type(
    tmp_path: Path, targets: Array, kind: str, classes: tuple[str, ...], expected: Array
) -> None:
    splits = load(write(tmp_path / "a.npz", {"x": PIXELS, "y": targets}))
    assert (splits.spec.target, splits.spec.classes) == (kind, classes)
    types = {"class": torch.int64, "labels": torch.uint8, "numbers": torch.float32, "mask": torch.uint8}
    assert splits.train.targets.dtype == types[kind]
    assert samples(splits) == dict(enumerate(torch.from_numpy(expected).to(types[kind]).tolist()))


@pytest.mark.parametrize(
    ("targets", "kind", "classes", "expected"),
    [
        (np.eye(3)[CLASSES], "class", None, CLASSES),
        (CLASSES.astype(np.float64), "class", ["a", "b", "c", "d"], CLASSES),
        (np.eye(3, dtype=int)[CLASSES], "labels", ["a", "b", "c"], np.eye(3)[CLASSES]),
        (CLASSES > 1, "labels", ["broken"], (CLASSES > 1)[:, None]),
        (CLASSES, "numbers", ["age"], CLASSES[:, None]),
    ],
)
def test_the_kind_and_the_names_are_as_the_user_says(
    tmp_path: Path, targets: Array, kind: str, classes: list[str] | None, expected: Array
) -> None:
    splits = load(write(tmp_path / "a.npz", {"x": PIXELS, "y": targets}), target=kind, classes=classes)
    assert (splits.spec.target, splits.spec.classes) == (kind, tuple(classes or "012"))
    assert samples(splits) == dict(enumerate(expected.tolist()))


def test_other_values_of_as_many_samples_are_noticed(tmp_path: Path) -> None:
    """Also where the labels are exchanged, so that neither counts nor channel statistics differ."""
    before = data_manifest(load(write(tmp_path / "a.npz", {"x": PIXELS, "y": CLASSES})))
    assert data_changes(before, data_manifest(load(tmp_path / "a.npz"))) == []
    now = data_manifest(load(write(tmp_path / "a.npz", {"x": PIXELS, "y": CLASSES[::-1]})))
    assert data_changes(before, now) == ["samples or targets have other values, and are as many as before"]
    assert data_changes({key: before[key] for key in before if key != "fingerprint"}, now) == []
    assert data_changes(before, {"channels": 1}) == []
