"""Files of arrays, and tables, that can't be trained on are refused in one line that says what is wrong and where."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distrain.data import decode_processes
from distrain.errors import ConfigError
from tests.data.helpers import decode_here, source, write_image

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


#: Text of a table beside images a.png and b.png, keys, and the line.
WRONG_TABLES: dict[str, tuple[str, dict[str, Any], str]] = {
    "no such column": (
        "file,label\na.png,0\n", {}, "data.path_column=path: FILE has no such column; choices: file, label",
    ),
    "no such label column": (
        "path,y\na.png,0\n", {"label_column": ["y", "z"]},
        "data.label_column=z: FILE has no such column; choices: path, y",
    ),
    "no such split column": (
        "path,label\na.png,0\n", {"split_column": "fold"}, "data.split_column=fold: FILE has no such column; choices:",
    ),
    "two columns of a name": ("path,label,label\na.png,0,1\n", {}, "data.root=FILE: the header has two columns label"),
    "no rows": ("path,label\n\n", {}, "data.root=FILE: has no rows below the header"),
    "no header": ("\npath,label\n", {}, "data.root=FILE: begins with an empty line"),
    "too many cells": (
        "path,label\na.png,0\nb.png,1,2\n", {}, "data.root=FILE: row 3 has 3 cells, and the header 2; a cell with",
    ),
    "an open quote": ('path,label\na.png,0\nb.png,"1\n', {}, "data.root=FILE: line 3: unexpected end of data"),
    "another encoding": (
        "path,label\na.png,caf\udce9\n", {},
        "data.root=FILE: line 2 is not UTF-8 (invalid continuation byte); iconv -f",
    ),
    "an empty path": ("path,label\na.png,0\n,1\n", {}, "data.root=FILE: row 3, column path: is empty; the path of a"),
    "a missing file": (
        "path,label\na.png,0\n\nc.png,1\n", {},
        "data.root=FILE: row 4, column path: c.png is not in FOLDER; data.images=FOLDER says where the images are",
    ),
    "a folder": ("path,label\na.png,0\nfolder,1\n", {}, "data.root=FILE: row 3, column path: folder is no file"),
    "a path that leads outside": (
        "path,label\na.png,0\n../../etc/passwd,1\n", {},
        "data.root=FILE: row 3, column path: ../../etc/passwd is outside of FOLDER; data.images=FOLDER names a folder",
    ),
    "an absolute path outside": (
        "path,label\na.png,0\n/etc/passwd,1\n", {},
        "data.root=FILE: row 3, column path: /etc/passwd is outside of FOLDER; data.images=FOLDER names a folder",
    ),
    "a link to outside": (
        "path,label\na.png,0\nlink.png,1\n", {},
        "data.root=FILE: row 3, column path: link.png is a symbolic link to outside of FOLDER",
    ),
    "a folder that is a link to outside": (
        "path,label\na.png,0\nlink/x.png,1\n", {},
        "data.root=FILE: row 3, column path: link/x.png is a symbolic link to outside of FOLDER",
    ),
    "an empty label": ("path,label\na.png,0\nb.png,\n", {}, "data.root=FILE: row 3, column label: is empty; the class"),
    "NaN as a label": (
        "path,label\na.png,0\nb.png,NaN\n", {},
        "data.root=FILE: row 3, column label: is NaN; the class",
    ),
    "one class": ("path,label\na.png,x\nb.png,x\n", {}, "data.root=FILE: column label has one class alone, x; two or"),
    "an unknown class": (
        "path,label\na.png,x\nb.png,y\n", {"classes": ["x", "z"]},
        "data.root=FILE: row 3, column label: y can't be learned: it is none of data.classes",
    ),
    "a class that no training row has": (
        "path,label,split\na.png,x,train\nb.png,y,train\nb.png,z,test\n", {},
        "data.root=FILE: row 4, column label: z can't be learned: no training row has it",
    ),
    "an unknown part": (
        "path,label,split\na.png,x,train\nb.png,y,dev\n", {},
        "data.root=FILE: row 3, column split: is dev; train, training",
    ),
    "an empty part": (
        "path,label,split\na.png,x,train\nb.png,y,\n", {},
        "data.root=FILE: row 3, column split: is empty; ",
    ),
    "no training rows": (
        "path,label,split\na.png,x,test\n", {},
        "data.root=FILE: column split has no row for training",
    ),
    "a label that is neither 0 nor 1": (
        "path,u,v\na.png,0,1\nb.png,1,2\n", {"label_column": ["u", "v"], "target": "labels"},
        "data.root=FILE: row 3, column v: is 2; a label is 0 or 1",
    ),
    "NaN as a number": (
        "path,u\na.png,0.5\nb.png,nan\n", {"label_column": "u", "target": "numbers"},
        "data.root=FILE: row 3, column u: is nan; a finite number is needed",
    ),
    "a decimal comma": (
        'path;u\na.png;0,5\n', {"label_column": "u", "target": "numbers"},
        "data.root=FILE: row 2, column u: is 0,5; a finite number is needed; decimals are written with a point",
    ),
    "several columns of classes": (
        "path,u,v\na.png,0,1\n", {"label_column": ["u", "v"], "target": "class"},
        "data.label_column=['u', 'v']: name 2 columns, and data.target=class needs one",
    ),
    "another number of names": (
        "path,u,v\na.png,0,1\n", {"label_column": ["u", "v"], "classes": ["u"]},
        "data.classes=['u']: are 1 names, and data.label_column names 2 columns",
    ),
    "masks without names of classes": (
        "path,label\na.png,b.png\n", {}, "data.classes=null: masks need the names of the classes",
    ),
    "a coloured mask": (
        "path,label\na.png,c.bmp\n", {"classes": ["u", "v"]},
        "data.on_error=stop: FOLDER/c.bmp can't be decoded (is coloured",
    ),
    "a JPEG as a mask": (
        "path,label\na.png,c.jpg\n", {"classes": ["u", "v"]},
        "data.on_error=stop: FOLDER/c.jpg can't be decoded (is a JPEG",
    ),
    "a mask of another size": (
        "path,label\na.png,tall.png\n", {"classes": ["u", "v"]},
        "data.on_error=stop: FOLDER/tall.png can't be decoded (is 4x6 pixels, and its image",
    ),
    "a pixel of no class": (
        "path,label\na.png,b.png\na.png,seven.png\n", {"classes": ["u", "v"]},
        "data.root=FILE: row 3, column label: seven.png holds 7; data.classes names 2, from 0 on",
    ),
    "no folder of images": (
        "path,label\na.png,0\nb.png,1\n", {"images": "/not/here"}, "data.images=/not/here: is not a folder",
    ),
}  # fmt: skip


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with images and masks, and links that lead out of it."""
    folder, outside = tmp_path / "images", tmp_path / "outside"
    (folder / "folder").mkdir(parents=True)
    for name, value, shape in (
        ("a.png", 0, (4, 4)), ("b.png", 1, (4, 4)), ("seven.png", 7, (4, 4)), ("tall.png", 0, (6, 4)),
        ("c.jpg", 0, (4, 4)), ("c.bmp", [0, 1, 2], (4, 4, 3)), ("../outside/x.png", 0, (4, 4)),
    ):  # fmt: skip
        write_image(folder / name, np.full(shape, value, dtype=np.uint8))
    (folder / "link.png").symlink_to(outside / "x.png")
    (folder / "link").symlink_to(outside)
    return folder


@pytest.mark.parametrize("name", WRONG_TABLES)
def test_wrong_tables_are_refused_in_one_line(images: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_processes, "run", decode_here)
    text, keys, line = WRONG_TABLES[name]
    path = images / "table.csv"
    path.write_bytes(text.encode(errors="surrogateescape"))
    said = refusal("table", root=str(path), height=4, width=4, **keys)
    assert said.startswith(line.replace("FILE", str(path)).replace("FOLDER", str(images), 1))
    assert "\n" not in said


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("nowhere.csv", None, "there is no such table (.csv, .tsv, .parquet)"),
        ("folder", None, "is a folder; name the table in it"),
        ("a.xlsx", b"PK", "is a spreadsheet; save it as CSV"),
        ("a.csv", b"", "begins with an empty line"),
        ("a.csv", b"path,label\na\0.png,0\n", ""),
    ],
)
def test_files_that_are_no_tables_are_refused(images: Path, name: str, content: bytes | None, line: str) -> None:
    if content is not None:
        (images / name).write_bytes(content)
    said = refusal("table", root=str(images / name), height=4, width=4)
    assert said.startswith(f"data.root={images / name}: {line}")
    assert "\n" not in said
