"""An index of tar shards: where each image lies and which label it has, made once and kept in the folder of caches."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from distrain.data import cache_folder
from distrain.data.byte_ranges import ByteRanges
from distrain.data.image_cache import ImageFile
from distrain.data.tar_shards import BadShard, Endings, ShardContent, read_shard
from distrain.errors import ConfigError
from distrain.files.untrusted import read_json

log = logging.getLogger(__name__)
_FORMAT = 1
_SAMPLES, _META = "samples.i64", "meta.json"
_MAX_META_BYTES = 1 << 28
#: Shards whose headers are read at the same time: over a network most of the time is spent waiting.
_THREADS = 8


@dataclass(frozen=True)
class ShardIndex:
    """The samples of all shards, shard by shard in the order of each tar.

    Attributes:
        pieces: Where the images lie; its files are the shards.
        labels: Index in ``values`` of each sample's label, int64 [N].
        values: The labels that occur: class numbers, or names; sorted.
        left_out: How many members of each ending are not used.
    """

    pieces: ByteRanges
    labels: npt.NDArray[np.int64]
    values: tuple[int | str, ...]
    left_out: Counter[str]


def open_or_build(root: Path, shards: Sequence[ImageFile], endings: Endings, folder: Path) -> ShardIndex:
    """Opens the index of some shards, and reads their headers and labels first if there is none.

    Args:
        root: Folder of the shards.
        shards: The tars, with their sizes and modification times: if one changes, the index is made anew.
        endings: How images and labels are told apart.
        folder: Folder that holds caches.

    Raises:
        ConfigError: A shard can't be used, or the folder can't be written.
    """
    target = folder / _digest(root, shards, endings, folder)
    return cache_folder.open_or_build(
        root, target, lambda: _open(root, shards, target), lambda built: _build(root, shards, endings, built)
    )


def _digest(root: Path, shards: Sequence[ImageFile], endings: Endings, folder: Path) -> str:
    place = "" if folder.resolve().is_relative_to(root.resolve()) else os.fspath(root.resolve())
    files = [[file.path, file.size, file.mtime_ns] for file in shards]
    content = json.dumps(["shards", _FORMAT, place, astuple(endings), files])
    return hashlib.sha256(content.encode()).hexdigest()[:24]


def _open(root: Path, shards: Sequence[ImageFile], target: Path) -> ShardIndex | None:
    """Returns the index if it is complete and possible, else ``None``."""
    try:
        meta = read_json(target / _META, _MAX_META_BYTES)
        samples = np.fromfile(target / _SAMPLES, dtype=np.int64).reshape(4, -1)
        values, left_out = meta["values"], Counter({str(key): int(n) for key, n in meta["left_out"].items()})
        if samples.shape[1] != meta["samples"] or not all(isinstance(value, int | str) for value in values):
            return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    shard, start, size, label = samples
    possible = (samples >= 0).all() and (shard < len(shards)).all() and (label < len(values)).all()
    if not possible or (start + size > np.array([file.size for file in shards])[shard]).any():
        return None
    paths = [root / file.path for file in shards]
    return ShardIndex(ByteRanges(paths, shard, start, size), label, tuple(values), left_out)


def _build(root: Path, shards: Sequence[ImageFile], endings: Endings, built: Path) -> None:
    built.mkdir()
    log.info("looking through %d shards in %s", len(shards), root)
    contents: list[ShardContent] = []
    with (
        ThreadPoolExecutor(min(_THREADS, len(shards))) as pool,
        tqdm(desc="indexing", total=len(shards), unit="shard", disable=None) as bar,
    ):
        try:
            for content in pool.map(lambda shard: _read(root, shard.path, endings), shards):
                contents.append(content)
                bar.update()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    for shard, content in zip(shards, contents, strict=True):
        if content.label_ending != contents[0].label_ending:
            found = f"{shards[0].path} has .{contents[0].label_ending}, {shard.path} .{content.label_ending}"
            raise ConfigError("data.label_ext", endings.label, f"shards have other labels: {found}")
    labels: list[int | str] = [label for content in contents for label in content.labels]
    # A name may consist of digits: then all labels are names.
    if not all(isinstance(label, int) for label in labels):
        labels = [str(label) for label in labels]
    values = sorted(set(labels), key=lambda value: (value if isinstance(value, int) else 0, str(value)))
    codes = {value: code for code, value in enumerate(values)}
    counts = [len(content.start) for content in contents]
    samples = np.array(
        [
            np.repeat(np.arange(len(contents)), counts),
            [start for content in contents for start in content.start],
            [size for content in contents for size in content.size],
            [codes[label] for label in labels],
        ],
        dtype=np.int64,
    )
    samples.tofile(built / _SAMPLES)
    left_out = sum((content.left_out for content in contents), Counter[str]())
    meta = {"format": _FORMAT, "samples": len(labels), "values": values, "left_out": left_out}
    (built / _META).write_text(json.dumps(meta))


def _read(root: Path, path: str, endings: Endings) -> ShardContent:
    try:
        return read_shard(root / path, endings)
    except BadShard as error:
        raise ConfigError("data.root", root, f"{path}: {error}") from error
