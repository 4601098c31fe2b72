"""Files of arrays, and tables, that can't be trained on are refused in one line that says what is wrong and where."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distrain.errors import ConfigError
from tests.data.helpers import source

X = np.zeros((6, 4, 4), dtype=np.uint8)
Y = np.arange(6) % 2
NAN = np.where(np.arange(6) == 4, np.nan, 1.0)
LARGE = np.zeros((2, 1 << 10, 1 << 10), dtype=np.uint8)


def changed(array: Any, row: int, value: float) -> Any:
    """A copy of an array with another value in a row."""
    copy = np.array(array)
    copy[row] = value
    return copy


#: Arrays of an .npz file, keys, and the line.
WRONG_ARRAYS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no targets": ({"x": X}, {}, "data.arrays.train_labels: which array is it? There are x; names such as x_train"),
    "unknown names": ({"a": X, "b": Y}, {}, "data.arrays.train_images: which array is it? There are a, b"),
    "two that could be it": (
        {"x": X, "images": X, "y": Y}, {}, "data.arrays.train_images: both images and x could be it",
    ),
    "images without targets": (
        {"x": X, "y": Y, "x_test": X}, {}, "data.arrays.test_labels: which array is it? There are x, x_test, y",
    ),
    "a name that doesn't exist": (
        {"x": X, "y": Y}, {"arrays": {"train_images": "z"}},
        "data.arrays.train_images=z: there is no such array; choices:",
    ),
    "a role that doesn't exist": (
        {"x": X, "y": Y}, {"arrays": {"train_image": "x"}},
        "data.arrays.train_image: no such role of an array; choices:",
    ),
    "another number of targets": ({"x": X, "y": Y[:5]}, {}, "FILE: x has 6 images, and y 5 targets"),
    "rows of numbers": ({"x": X.reshape(6, -1), "y": Y}, {}, "FILE: x is [6, 16]; images [N, H, W], [N, C, H, W] or"),
    "an unknown layout": (
        {"x": np.zeros((6, 3, 4, 3), np.uint8), "y": Y}, {},
        "data.layout=auto: x is [6, 3, 4, 3], which may be [N, C, H, W] or [N, H, W, C]; choices: nchw, nhwc",
    ),
    "whole numbers as pixels": ({"x": X.astype(int), "y": Y}, {}, "FILE: x is int64; images are uint8 (0 to 255)"),
    "NaN in an image": (
        {"x": changed(X.astype(float), 3, np.nan), "y": Y}, {}, "FILE: x[3] has pixels that are NaN or infinite",
    ),
    "no samples": ({"x": X[:0], "y": Y[:0]}, {}, "FILE: x is [0, 4, 4]: it holds nothing"),
    "parts of other sizes": (
        {"x": X, "y": Y, "x_test": X[:, :3], "y_test": Y}, {}, "FILE: x_test has images [1, 3, 4], and x [1, 4, 4]",
    ),
    "parts of other types": (
        {"x": X, "y": Y, "x_test": X.astype(float), "y_test": Y}, {}, "FILE: x_test is float64, and x uint8",
    ),
    "a negative class": ({"x": X, "y": changed(Y, 2, -1)}, {}, "FILE: y[2] is -1; classes are numbered from 0"),
    "no class number": (
        {"x": X, "y": Y / 2}, {"target": "class"}, "FILE: y[1] is 0.5; class numbers are whole numbers",
    ),
    "a class without a name": (
        {"x": X, "y": changed(Y, 5, 7)}, {"classes": ["a", "b"]},
        "data.classes=['a', 'b']: are 2 names, for classes from 0 on, and y[5] is of class 7",
    ),
    "NaN as a target": ({"x": X, "y": NAN}, {}, "FILE: y[4] holds nan; a finite number is needed"),
    "a label that is neither 0 nor 1": (
        {"x": X, "y": changed(np.ones((6, 3), int), 5, 2)}, {}, "FILE: y[5] holds 2; a label is 0 or 1",
    ),
    "a class in a part that the training samples lack": (
        {"x": X, "y": np.array(list("ababab")), "x_test": X, "y_test": np.array(list("abacab"))}, {},
        "FILE: y_test[3] is c, and no training sample is of this class",
    ),
    "masks of another size": (
        {"x": X, "y": np.zeros((6, 3, 3), int)}, {}, "FILE: y has masks [3, 3], and x has images [4, 4]",
    ),
    "masks of floating point": (
        {"x": X, "y": np.zeros((6, 4, 4))}, {}, "FILE: y is float64 [6, 4, 4]; masks hold whole numbers",
    ),
    "a pixel that is no class": (
        {"x": X, "y": changed(np.zeros((6, 4, 4), int), 1, -1)}, {}, "FILE: y[1] holds -1; a mask holds the class",
    ),
    "too few names": (
        {"x": X, "y": np.zeros((6, 3))}, {"classes": ["a"]}, "data.classes=['a']: are 1 names, and y has 3 columns",
    ),
    "too large": (
        {"x": LARGE, "y": Y[:2]}, {"memory_limit_mb": 1},
        "data.memory_limit_mb=1: the images need 2 MiB; unzip a.npz -d FOLDER, and name that folder",
    ),
    "Python objects": (
        {"x": X, "y": np.array([{}] * 6, dtype=object)}, {},
        "FILE: y.npy holds Python objects, whose pickle could run code",
    ),
}  # fmt: skip


def refusal(choice: str, **keys: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        source(choice, **keys).load()
    return str(caught.value)


@pytest.mark.parametrize("name", WRONG_ARRAYS)
def test_wrong_arrays_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    arrays, keys, line = WRONG_ARRAYS[name]
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)
    said = refusal("numpy", root=str(path), **keys)
    assert said.startswith(line.replace("FILE", f"data.root={path}"))
    assert "\n" not in said


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("nowhere.npz", None, "is neither an .npz file nor a folder of .npy files: it doesn't exist"),
        ("a.npy", b"", "is one array; name its folder"),
        ("a.npz", b"no archive", "is no .npz file, or a damaged one (File is not a zip file)"),
        ("a", [("a.txt", b"")], "has no arrays (.npy)"),
        ("a", [("a.npz", b"")], "has no arrays (.npy); for a file in it type data.root="),
        ("a", [("x.npy", b"\x93NUMPY\x01\x00\x05\x00{'des")], "x.npy is damaged"),
    ],
)
def test_files_that_hold_no_arrays_are_refused(tmp_path: Path, name: str, content: Any, line: str) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.mkdir()
        for inner, data in content:
            (path / inner).write_bytes(data)
    assert refusal("numpy", root=str(path)).startswith(f"data.root={path}: {line}")


def test_a_damaged_array_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, x=LARGE, y=Y[:2])
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("x.npy").header_offset
    content = bytearray(path.read_bytes())
    content[offset + 100_000] ^= 1
    path.write_bytes(content)
    assert refusal("numpy", root=str(path)).startswith(f"data.root={path}: x can't be read (Bad CRC-32")
