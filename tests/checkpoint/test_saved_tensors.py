"""Slices that ranks have saved are read as whole tensors, one at a time; files that no run writes are refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distrain.checkpoint import safetensors_writer
from distrain.checkpoint.format import DamagedCheckpoint
from distrain.checkpoint.saved_tensors import SLICES, SavedTensors, TensorSlice, slices_text

WHOLE = {
    "kernel": torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last),
    "half": torch.randn(7).bfloat16(),
    "number": torch.tensor(5.0),
    # The product of its strides has more bits than a number of elements may have.
    "dimensions": torch.randn(1, 2, 2, 8, 8, 16, 16, 1),
}


def write(path: Path, tensors: Mapping[str, Tensor], slices: Mapping[str, TensorSlice]) -> Path:
    safetensors_writer.write_alone(path, tensors, {SLICES: slices_text(slices)} if slices else {})
    return path


def slice_of(name: str, start: int, stop: int) -> tuple[Tensor, TensorSlice]:
    whole = WHOLE[name]
    elements = whole.as_strided((whole.numel(),), (1,))[start:stop]
    return elements, TensorSlice(tuple(whole.shape), whole.stride(), start)


def files(folder: Path, *parts: dict[str, tuple[int, int]]) -> list[Path]:
    """A file for each rank, with these elements of the tensors."""
    paths = []
    for rank, part in enumerate(parts):
        found = {name: slice_of(name, *elements) for name, elements in part.items()}
        tensors = {name: tensor for name, (tensor, _) in found.items()} | {f"own {rank}": torch.arange(rank)}
        paths.append(write(folder / f"{rank}", tensors, {name: place for name, (_, place) in found.items()}))
    return paths


def test_slices_are_joined_in_the_memory_order_of_their_tensor(tmp_path: Path) -> None:
    paths = files(
        tmp_path,
        {"kernel": (20, 48), "number": (0, 1), "dimensions": (9, 65536)},
        {"kernel": (0, 20), "half": (0, 7), "dimensions": (0, 9)},
    )
    saved = SavedTensors.of_files(paths)
    assert set(saved) == {*WHOLE, "own 0", "own 1"}
    for name, tensor in WHOLE.items():
        assert torch.equal(saved[name], tensor)
        assert saved[name].dtype == tensor.dtype
    assert torch.equal(saved["own 1"], torch.arange(1))
    # Files that are removed while a run is read stay readable.
    for path in paths:
        path.unlink()
    assert torch.equal(saved["kernel"], WHOLE["kernel"])


def test_the_same_slices_give_the_same_file_in_any_order(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    found = {name: slice_of(name, 0, WHOLE[name].numel()) for name in ("half", "kernel")}
    for path, names in ((first, ["half", "kernel"]), (second, ["kernel", "half"])):
        write(path, {name: found[name][0] for name in names}, {name: found[name][1] for name in names})
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (({"half": (0, 3)}, {"half": (4, 7)}), "begins at 4, not at 3"),
        (({"half": (0, 3)}, {"half": (2, 7)}), "begins at 2, not at 3"),
        (({"half": (0, 3)},), "of which 4 are missing"),
    ],
)
def test_slices_that_do_not_make_up_a_tensor_are_refused(
    parts: tuple[dict[str, tuple[int, int]], ...], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(DamagedCheckpoint, match=reason):
        SavedTensors.of_files(files(tmp_path, *parts))


def test_slices_of_different_tensors_and_a_slice_beside_the_whole_are_refused(tmp_path: Path) -> None:
    (path,) = files(tmp_path, {"half": (0, 3)})
    rest = WHOLE["half"][3:]
    other = write(tmp_path / "other", {"half": rest}, {"half": TensorSlice((7, 1), (1, 1), 3)})
    with pytest.raises(DamagedCheckpoint, match="doesn't fit those in other files"):
        SavedTensors.of_files([path, other])
    whole = write(tmp_path / "whole", {"half": WHOLE["half"]}, {})
    for paths in ([path, whole], [whole, path]):
        with pytest.raises(DamagedCheckpoint, match="holds half, which another file holds too"):
            SavedTensors.of_files(paths)


def file_with(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[Any], begin: int, end: int, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def with_slice(shape: Any, strides: Any, start: Any, name: str = "a") -> bytes:
    header = {"a": entry([2], 0, 2), "__metadata__": {SLICES: json.dumps({name: [shape, strides, start]})}}
    return file_with(header, b"ab")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        file_with(b"{}", length=1 << 62),
        file_with(b"{} "[:1]),
        file_with(b"[1]"),
        file_with(b"[" * 5000),
        file_with({"a": 3}),
        file_with({"a": entry([2], 0, 3)}, b"abc"),
        file_with({"a": entry([2], 0, 2), "b": entry([2], 1, 3)}, b"abc"),
        file_with({"a": entry([2], 1, 3)}, b"abc"),
        file_with({"a": entry([2], 0, 2)}, b"abc"),
        file_with({"a": entry([1 << 40, 1 << 40, 0], 0, 0)}),
        file_with({"a": entry([-1, -2], 0, 2)}, b"ab"),
        file_with({"a": entry([True, 2], 0, 2)}, b"ab"),
        file_with({"a": entry([2], 0, 2, "Q8")}, b"ab"),
        file_with({"__metadata__": [1]}),
        file_with({"__metadata__": {SLICES: 3}}),
        file_with({"__metadata__": {SLICES: "[]"}}),
        with_slice([4], [1], 0, name="b"),
        with_slice([4], [2], 0),
        with_slice([4], [1, 1], 0),
        with_slice([4], [1], 3),
        with_slice([4], [1], -1),
        with_slice([1 << 31, 1 << 31], [1 << 31, 1], 0),
        with_slice("4", [1], 0),
        with_slice([4], [1], None),
    ],
    ids=range(26),
)
def test_files_that_no_run_writes_are_refused_by_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=r"model\.safetensors is not a safetensors file: .") as refused:
        SavedTensors.of_files([path])
    assert "\n" not in str(refused.value)
