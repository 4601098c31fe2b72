"""Tar files of samples (WebDataset's layout): which there are, and where the images and labels lie in them.

A sample is all members whose names agree up to the first dot: ``0001.jpg`` and ``0001.cls``. A member's header is read
once, and its place noted; then any sample can be read at any time, which a stream of a tar doesn't allow.

The standard library's tarfile is enough: it reads the headers of all kinds of tar, and nothing else is asked of it. It
unpacks nothing here. What a tar says is not believed before it is checked, as it may come from a stranger.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from distrain.data.decode import LARGEST_FILE, SUFFIXES
from distrain.files.untrusted import UnreadableFile, open_regular

#: Endings of images and of labels that are looked for, the preferred label first.
IMAGE_ENDINGS = tuple(suffix.removeprefix(".") for suffix in SUFFIXES)
LABEL_ENDINGS = ("cls", "json", "txt")
#: Endings of pickles, which can run code when they are read.
_PICKLES = ("pyd", "pkl", "pickle", "pth", "pt")
#: First bytes of compressed files, and what uncompresses one.
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ\0": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
_BLOCK = 512
#: Largest header of a member with all its extensions, in bytes. Long names need some hundred; Python 3.11's tarfile
#: needs quadratic time for a header of digits.
_LARGEST_HEADER = 16 * 1024
#: Most bytes after a tar's end: programs fill it up to a multiple of 10,240, or of their device's blocks.
_LARGEST_PADDING = 1 << 20
_LARGEST_LABEL = {"json": 1 << 20}
_LARGEST_TEXT = 4096


class BadShard(ValueError):
    """A tar can't be used; the message says why in one line, without the tar's name."""


@dataclass(frozen=True)
class Endings:
    """How members are told apart.

    Attributes:
        image: Ending of images; ``None``: any of :data:`IMAGE_ENDINGS`.
        label: Ending of labels; ``None``: the first of :data:`LABEL_ENDINGS` that the first sample has.
        key: Key of the label in a label that is a JSON object.
    """

    image: str | None
    label: str | None
    key: str


@dataclass
class _Sample:
    name: str
    image: tarfile.TarInfo | None = None
    labels: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ShardContent:
    """The samples of one tar, in its order.

    Attributes:
        start: Where each image begins in the tar, in bytes.
        size: Bytes of each image.
        labels: The label of each: a class number, or a name.
        label_ending: The ending that labels have.
        left_out: How many members of each ending are not used.
    """

    start: list[int]
    size: list[int]
    labels: list[int | str]
    label_ending: str
    left_out: Counter[str]


def read_shard(path: Path, endings: Endings) -> ShardContent:
    """Finds the samples of a tar.

    Raises:
        BadShard: It is compressed, damaged, truncated, or a sample lacks its image or label; there is a link, a device
            or a pickle in it, or a path out of its folder; or an image or label is too large.
        OSError: It can't be read.
    """
    try:
        file = open_regular(path)
    except UnreadableFile as error:
        raise BadShard(str(error)) from error
    with file:
        size = path.stat().st_size
        _refuse_compressed(file, path.name)
        samples: dict[str, _Sample] = {}
        left_out: Counter[str] = Counter()
        for member in _members(file, size):
            _sort_in(member, endings, samples, left_out)
        if not samples:
            raise BadShard("holds no samples")
        return _content(file, list(samples.values()), endings, left_out)


def _refuse_compressed(file: IO[bytes], name: str) -> None:
    start = file.read(8)
    file.seek(0)
    for magic, command in _COMPRESSED.items():
        if start.startswith(magic):
            problem = "is compressed, so that its samples can't be read in any order; images are compressed already"
            raise BadShard(f"{problem}: {command} {name}")


class _Headers:
    """An open tar as tarfile sees it, which asks for headers only: a larger read is refused."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.tell, self.seek = file.tell, file.seek

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _LARGEST_HEADER:
            raise tarfile.ReadError(f"a member's header of {size} bytes")
        return self._file.read(size)


def _members(file: IO[bytes], size: int) -> Iterator[tarfile.TarInfo]:
    """Yields the members of a tar after checking that each lies behind the one before and inside of the file."""
    end = 0
    try:
        # tarfile asks for nothing else of a file.
        with tarfile.open(fileobj=_Headers(file), mode="r:") as archive:  # type: ignore[call-overload]
            for member in archive:
                if member.size < 0 or member.offset_data < end:
                    raise BadShard(f"is damaged: {member.name} has an impossible size or place")
                end = member.offset_data + (-(-member.size // _BLOCK) * _BLOCK if member.isreg() else 0)
                if member.isreg() and not member.issparse() and member.offset_data + member.size > size:
                    raise BadShard(f"is truncated: it ends within {member.name}")
                yield member
    except BadShard:
        raise
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError) as error:
        raise BadShard(f"is no tar or is damaged ({str(error) or type(error).__name__})") from error
    # tarfile ends without an error where the next header is cut off or damaged.
    file.seek(end)
    rest = file.read(_LARGEST_PADDING + 1)
    if len(rest) < _BLOCK:
        raise BadShard("is truncated: the mark of a tar's end is missing")
    if any(rest[:_BLOCK]):
        raise BadShard(f"is damaged: there is no member at byte {end}")
    if len(rest) > _LARGEST_PADDING or any(rest):
        raise BadShard("goes on after its end, like tars joined by cat; keep them apart, or join them by tar -A")


def _sort_in(member: tarfile.TarInfo, endings: Endings, samples: dict[str, _Sample], left_out: Counter[str]) -> None:
    """Adds a member to its sample, or counts it as left out.

    Raises:
        BadShard: It is nothing that belongs in a data set, or its sample has such a member already.
    """
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise BadShard(f"{member.name} is a path to outside of the tar")
    if member.isdir():
        return
    if not member.isreg() or member.issparse():
        kind = "a link" if member.islnk() or member.issym() else "a sparse file" if member.issparse() else "no file"
        raise BadShard(f"{member.name} is {kind}; only regular files are read")
    if path.name.startswith("."):  # such as macOS adds
        left_out[""] += 1
        return
    stem, _, ending = path.name.partition(".")
    ending = ending.lower()
    if ending.rpartition(".")[2] in _PICKLES:
        raise BadShard(f"{member.name} is a pickle, which could run code; write labels as .cls or .json")
    key = str(path.with_name(stem))
    sample = samples.setdefault(key, _Sample(key))
    if ending == endings.image or (endings.image is None and ending in IMAGE_ENDINGS):
        if sample.image is not None:
            _refuse_second(sample.image, member, "data.image_ext")
        if member.size > LARGEST_FILE:
            raise BadShard(f"{member.name} has more than {LARGEST_FILE} bytes")
        sample.image = member
    elif ending == endings.label or (endings.label is None and ending in LABEL_ENDINGS):
        if ending in sample.labels:
            _refuse_second(sample.labels[ending], member, "data.label_ext")
        sample.labels[ending] = member
    else:
        sample.others.append(ending)
        left_out[ending] += 1


def _refuse_second(first: tarfile.TarInfo, second: tarfile.TarInfo, key: str) -> None:
    if first.name == second.name:
        raise BadShard(f"{second.name} appears twice")
    raise BadShard(f"{first.name} and {second.name} belong to one sample; {key} says which ending is used")


def _content(file: IO[bytes], samples: list[_Sample], endings: Endings, left_out: Counter[str]) -> ShardContent:
    ending = endings.label or next((ending for ending in LABEL_ENDINGS if ending in samples[0].labels), None)
    start, size, labels = [], [], []
    for sample in samples:
        if sample.image is None:
            raise BadShard(_lacks("image", [endings.image] if endings.image else IMAGE_ENDINGS, sample))
        if ending is None or ending not in sample.labels:
            raise BadShard(_lacks("label", [ending] if ending else LABEL_ENDINGS, sample))
        left_out.update(other for other in sample.labels if other != ending)
        start.append(sample.image.offset_data)
        size.append(sample.image.size)
        labels.append(_label(file, sample.labels[ending], ending, endings.key))
    assert ending is not None
    return ShardContent(start, size, labels, ending, left_out)


def _lacks(what: str, wanted: Iterable[str], sample: _Sample) -> str:
    line = f"{sample.name} has no {what} ({', '.join(f'.{ending}' for ending in wanted)})"
    fitting = [name for name in sample.others if (name.rpartition(".")[2] in IMAGE_ENDINGS) == (what == "image")]
    if not fitting:
        return line
    found = ", ".join(f".{ending}" for ending in fitting[:5])
    return f"{line}, but {found}; data.{what}_ext={fitting[0]} would name another ending"


def _label(file: IO[bytes], member: tarfile.TarInfo, ending: str, key: str) -> int | str:
    """The class number or name that a label holds.

    Raises:
        BadShard: It is too large, or holds neither.
    """
    kind = ending.rpartition(".")[2]
    largest = _LARGEST_LABEL.get(kind, _LARGEST_TEXT)
    if member.size > largest:
        raise BadShard(f"{member.name} has {member.size} bytes; a label has at most {largest}")
    file.seek(member.offset_data)
    try:
        text = file.read(member.size).decode().strip()
        if kind != "json":
            return _number_or_name(member, text)
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadShard):
            raise
        raise BadShard(f"{member.name} is not {'JSON' if kind == 'json' else 'UTF-8 text'} ({error})") from error
    if not isinstance(content, dict) or key not in content:
        keys = f", only {', '.join(list(content)[:8])}" if isinstance(content, dict) and content else ""
        raise BadShard(f"{member.name} has no key {key}{keys}; data.label_key names the label")
    value = content[key]
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise BadShard(f"{member.name}: {key} is neither a class number nor a name")
    return _number_or_name(member, str(value))


def _number_or_name(member: tarfile.TarInfo, text: str) -> int | str:
    if not text:
        raise BadShard(f"{member.name} is empty; a label is a class number or a name")
    if re.fullmatch(r"-\d+", text):
        raise BadShard(f"{member.name} holds {text}; classes are numbered from 0")
    return int(text) if re.fullmatch(r"\d{1,9}", text) else text
