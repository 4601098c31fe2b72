"""The tensors of a checkpoint's part, read from its files one at a time, when they are asked for.

A rank that keeps a part of a model must not hold all of it to load that part. And where ranks share a tensor, each
saves its slice, so that nobody gathers it to save it: the header of its file says which elements it has.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor
from typing_extensions import override

from distrain.checkpoint.format import MAX_JSON_BYTES, DamagedCheckpoint, unreadable
from distrain.files import untrusted

#: The names of types in a safetensors file.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
#: Key of the slices among what a file's header says besides its tensors.
SLICES = "slices"
_METADATA = "__metadata__"
#: More elements and bytes than any tensor has.
_MOST = 1 << 60
#: More dimensions than torch can compute with.
_MOST_DIMENSIONS = 64
#: Most files of a part that stay open; a process may have a thousand.
_MOST_OPEN = 64


class TensorSlice(NamedTuple):
    """Which elements of a tensor a slice has: consecutive ones in the tensor's memory order.

    Attributes:
        shape: Shape of the whole tensor.
        strides: Its strides, which say in what order its elements lie in memory, without gaps.
        start: Place of the slice's first element in that order.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int


#: For each part, the slices among a rank's tensors, by name; a tensor that is not named is whole.
Slices = Mapping[str, Mapping[str, TensorSlice]]


class _File:
    """A file that is read now and then.

    Args:
        path: The file.
        stays_open: Keep it open, so that it can be read though a run in progress removes its checkpoint.
    """

    def __init__(self, path: Path, *, stays_open: bool) -> None:
        self.path = path
        self._opened: IO[bytes] | None = None
        if stays_open:
            self._opened = untrusted.open_regular(path)
            weakref.finalize(self, _close, self._opened)

    @contextlib.contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """The file, open in this block.

        Raises:
            UnreadableFile: It is not a regular file.
            OSError: It can't be opened.
        """
        with untrusted.open_regular(self.path) if self._opened is None else nullcontext(self._opened) as file:
            yield file

    def read_into(self, target: Tensor, offset: int) -> None:
        """Fills a tensor with the bytes from ``offset`` on.

        Raises:
            DamagedCheckpoint: The file can't be read, or is shorter than it was.
        """
        view = target.view(torch.uint8).numpy().data
        try:
            with self.open() as file:
                file.seek(offset)
                found = file.readinto(view)  # type: ignore[attr-defined]
        except OSError as error:
            raise unreadable(self.path, error) from error
        if found != len(view):
            raise DamagedCheckpoint(f"{self.path} became shorter while it was read")


def _close(file: IO[bytes]) -> None:
    """Closes a file that was only read, which nothing depends on."""
    with contextlib.suppress(OSError):
        file.close()


class _Piece(NamedTuple):
    """A tensor, or a slice of one, in a file.

    Attributes:
        file: The file.
        offset: Where the elements begin in it, in bytes.
        start: Place of the first element in the tensor's memory order.
        size: Number of elements.
    """

    file: _File
    offset: int
    start: int
    size: int


@dataclass(frozen=True)
class SavedTensor:
    """A tensor that a checkpoint holds.

    Attributes:
        shape: Its shape.
        dtype: Its type.
        strides: Its strides once it is read.
        pieces: Where its elements are.
    """

    shape: torch.Size
    dtype: torch.dtype
    strides: tuple[int, ...]
    pieces: tuple[_Piece, ...]

    def read(self) -> Tensor:
        """Reads it from the disk.

        Raises:
            DamagedCheckpoint: A file can't be read, or is shorter than it was.
        """
        whole = torch.empty_strided(self.shape, self.strides, dtype=self.dtype)
        flat = whole.as_strided((whole.numel(),), (1,))
        for piece in self.pieces:
            if piece.size:
                piece.file.read_into(flat[piece.start : piece.start + piece.size], piece.offset)
        return whole


class _TensorsOnDemand(Mapping[str, Tensor]):
    """Tensors by name, of which only those are made that are asked for.

    Args:
        names: Has the names.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names

    @override
    def __contains__(self, name: object) -> bool:
        return name in self._names

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    @override
    def __len__(self) -> int:
        return len(self._names)


class SavedTensors(_TensorsOnDemand):
    """Tensors by name; each is read anew whenever it is asked for.

    Args:
        entries: What is known of each.
    """

    def __init__(self, entries: Mapping[str, SavedTensor]) -> None:
        super().__init__(entries)
        self.entries = entries

    @classmethod
    def of_files(cls, paths: Sequence[Path]) -> SavedTensors:
        """The tensors of a part, from one file or from the files of several ranks; only their headers are read.

        Raises:
            DamagedCheckpoint: A file is not what distrain writes, or a tensor is in two files, or not all of it is
                there.
        """
        entries: dict[str, SavedTensor] = {}
        sliced: dict[str, list[tuple[TensorSlice, torch.dtype, _Piece]]] = {}
        for path in paths:
            try:
                file = _File(path, stays_open=len(paths) <= _MOST_OPEN)
                with file.open() as opened:
                    header, data_begin = _read_header(opened)
                slices = _slices_of(header)
            except OSError as error:
                raise unreadable(path, error) from error
            except ValueError as error:
                raise DamagedCheckpoint(f"{path} is not a safetensors file: {error}") from error
            for name, (dtype, shape, begin) in header.tensors.items():
                count = math.prod(shape)
                if name in entries or (name in sliced and name not in slices):
                    raise DamagedCheckpoint(f"{path} holds {name}, which another file holds too")
                if name in slices:
                    piece = _Piece(file, data_begin + begin, slices[name].start, count)
                    sliced.setdefault(name, []).append((slices[name], dtype, piece))
                else:
                    strides = _contiguous_strides(shape)
                    whole = _Piece(file, data_begin + begin, 0, count)
                    entries[name] = SavedTensor(torch.Size(shape), dtype, strides, (whole,))
        for name, found in sliced.items():
            if name in entries:
                raise DamagedCheckpoint(f"{found[0][2].file.path} holds {name}, which another file holds too")
            entries[name] = _joined(name, found)
        return cls(entries)

    @override
    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name].read()


class JoinedTensors(_TensorsOnDemand):
    """Tensors of several mappings.

    Args:
        sources: For each name the mapping whose tensor of that name it is.
    """

    def __init__(self, sources: Mapping[str, Mapping[str, Tensor]]) -> None:
        super().__init__(sources)
        self._sources = sources
        self.entries = {name: described(source)[name] for name, source in sources.items()}

    @override
    def __getitem__(self, name: str) -> Tensor:
        return self._sources[name][name]


class ConvertedTensors(_TensorsOnDemand):
    """Tensors, each converted when it is asked for.

    Args:
        tensors: By name.
        convert: Gives a tensor of the same shape.
    """

    def __init__(self, tensors: Mapping[str, Tensor], convert: Callable[[str, Tensor], Tensor]) -> None:
        super().__init__(tensors)
        self._tensors, self._convert = tensors, convert

    @override
    def __getitem__(self, name: str) -> Tensor:
        return self._convert(name, self._tensors[name])


def described(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor | SavedTensor]:
    """Shape and type of each tensor by name; nothing is read for it."""
    return tensors.entries if isinstance(tensors, SavedTensors | JoinedTensors) else tensors


def _joined(name: str, found: Sequence[tuple[TensorSlice, torch.dtype, _Piece]]) -> SavedTensor:
    """The tensor of which ranks saved slices.

    Raises:
        DamagedCheckpoint: They are not slices of one tensor, or don't make up all of it.
    """
    (first, dtype, piece), *_ = found
    path = piece.file.path
    if any((each.shape, each.strides, other) != (first.shape, first.strides, dtype) for each, other, _ in found):
        raise DamagedCheckpoint(f"{path} holds a slice of {name} that doesn't fit those in other files")
    pieces = tuple(sorted((each for _, _, each in found), key=lambda each: each.start))
    end = 0
    for each in pieces:
        if each.start != end:
            raise DamagedCheckpoint(
                f"{each.file.path} holds a slice of {name} that begins at {each.start}, not at {end}"
            )
        end += each.size
    if end != math.prod(first.shape):
        raise DamagedCheckpoint(f"{path} holds a slice of {name}, of which {math.prod(first.shape) - end} are missing")
    return SavedTensor(torch.Size(first.shape), dtype, first.strides, pieces)


# --- headers ---------------------------------------------------------------------------------------------------------


class _Header(NamedTuple):
    """What a file's header says.

    Attributes:
        tensors: Type and shape of each tensor, and where it begins in the file's data.
        metadata: Texts by name.
    """

    tensors: dict[str, tuple[torch.dtype, tuple[int, ...], int]]
    metadata: dict[str, Any]


def _read_header(file: IO[bytes]) -> tuple[_Header, int]:
    """A file's header, and where its data begin.

    Raises:
        ValueError: It is not a safetensors file; the message says why.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(size - 8, MAX_JSON_BYTES):
        raise ValueError(f"its header can't have {length} bytes")
    content = untrusted.parse_json("its header", file.read(length).decode())
    metadata = content.pop(_METADATA, {})
    if not isinstance(metadata, dict):
        raise ValueError("what its header says besides tensors is not a mapping")
    tensors, places = {}, []
    for name, entry in content.items():
        dtype, shape, begin, end = _tensor_entry(name, entry)
        tensors[name] = (dtype, shape, begin)
        places.append((begin, end))
    last = 0
    for begin, end in sorted(places):
        if begin != last:
            raise ValueError("its tensors overlap, or there are gaps between them")
        last = end
    if last != size - 8 - length:
        raise ValueError(f"its tensors have {last} bytes, not {size - 8 - length}")
    return _Header(tensors, metadata), 8 + length


def _tensor_entry(name: str, entry: object) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or entry.get("dtype") not in DTYPES:
        raise ValueError(f"{name} has no known type")
    dtype, shape, offsets = DTYPES[entry["dtype"]], entry.get("shape"), entry.get("data_offsets")
    if not _are_sizes(shape) or not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise ValueError(f"{name} has no shape and place of whole numbers")
    if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        raise ValueError(f"{name} has a shape that doesn't fit its bytes")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _slices_of(header: _Header) -> dict[str, TensorSlice]:
    """The slices among a file's tensors.

    Raises:
        ValueError: The header says what no run writes.
    """
    text = header.metadata.get(SLICES, "{}")
    if not isinstance(text, str):
        raise ValueError("its slices are not text")
    found = {}
    for name, entry in untrusted.parse_json("the list of its slices", text).items():
        if name not in header.tensors or not isinstance(entry, list) or len(entry) != 3:
            raise ValueError(f"it has no slice {name}")
        shape, strides, start = entry
        if not (_are_sizes(shape) and _are_numbers(strides) and _is_size(start) and is_dense(shape, strides)):
            raise ValueError(f"its slice {name} is not of a dense tensor")
        (count,) = header.tensors[name][1] if len(header.tensors[name][1]) == 1 else (-1,)
        if not 0 < count <= math.prod(shape) - start:
            raise ValueError(f"its slice {name} has more elements than its tensor")
        found[name] = TensorSlice(tuple(shape), tuple(strides), start)
    return found


def slices_text(slices: Mapping[str, TensorSlice]) -> str:
    """What the header of a file says of the slices in it, the same text for the same slices."""
    plain = {name: [list(each.shape), list(each.strides), each.start] for name, each in slices.items()}
    return json.dumps(plain, sort_keys=True)


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    """Whether these are whole numbers whose product torch can count with."""
    return _are_numbers(value) and _product(value) < _MOST


def _are_numbers(value: object) -> TypeGuard[list[int]]:
    """Whether these are a whole number for each dimension of a tensor."""
    return isinstance(value, list) and len(value) <= _MOST_DIMENSIONS and all(map(_is_size, value))


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _product(sizes: Sequence[int]) -> int:
    """Elements of a tensor whose empty dimensions have one."""
    return math.prod(max(1, size) for size in sizes)


def _contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(_product(shape[dimension + 1 :]) for dimension in range(len(shape)))


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements fill a block of memory, each once, in any order of dimensions."""
    if len(shape) != len(strides):
        return False
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size == 0:
            return True
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True
