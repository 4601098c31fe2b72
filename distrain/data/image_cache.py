"""A cache of images, decoded or encoded, shared by all ranks and jobs of a host.

A cache is a folder, see :mod:`distrain.data.cache_folder`, with ::

    images.u8     decoded images: uint8 [N, C, H, W]; zeros for an image that can't be decoded
    encoded.bin   or encoded images: the content of the image files, one after the other
    sizes.i64     int64 [N], bytes of each encoded image
    moments.i64   int64 [N, C, 2], sums and sums of squares of each image's pixels, for the channel statistics
    meta.json     number and shape of the images, and which can't be decoded for what reason

One large file of encoded images is read faster than millions of small ones, above all over a network. A cache without
images, of moments alone, belongs to images that are read where they lie.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distrain.data import cache_folder, decode, decode_processes
from distrain.data.byte_ranges import ByteRanges, end_to_end
from distrain.errors import ConfigError
from distrain.files.untrusted import read_json
from distrain.runtime.device import available_cores

log = logging.getLogger(__name__)
#: Raised when images are decoded to other pixels than before: 2 lays transparent ones over white, inverts a 16-bit TIFF
#: whose 0 is white, and scales one of 12 bits by 12.
_FORMAT = 2
_IMAGES, _ENCODED, _SIZES, _MOMENTS, _META = "images.u8", "encoded.bin", "sizes.i64", "moments.i64", "meta.json"
_MOMENT_BYTES = 2 * 8
_MAX_META_BYTES = 1 << 30
#: What a cache may keep of each image: its pixels, the content of its file, or nothing but its moments.
PIXELS, ENCODED, MOMENTS = "pixels", "encoded", "moments"


@dataclass(frozen=True)
class ImageFile:
    """An image file: path relative to the root, size in bytes, and modification time in nanoseconds."""

    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class CacheSpec:
    """Everything that a cache's content depends on.

    Attributes:
        root: Folder of the image files.
        files: The files, in the order of the cache.
        channels: 3 for RGB, 1 for greyscale.
        height: Height of the decoded images in pixels.
        width: Width of the decoded images in pixels.
        skip_broken: Whether images that can't be decoded are allowed.
        keeps: :data:`PIXELS`, :data:`ENCODED` or :data:`MOMENTS`.
        pieces: Where in the files the images lie; ``None`` if each file is an image.
        masks_of: The images that the files are masks of, in the same order; ``None`` if they are images themselves.
    """

    root: Path
    files: Sequence[ImageFile]
    channels: int
    height: int
    width: int
    skip_broken: bool
    keeps: str = PIXELS
    pieces: ByteRanges | None = None
    masks_of: Sequence[ImageFile] | None = None

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.files if self.pieces is None else self.pieces)

    @property
    def image_bytes(self) -> int:
        """Bytes of one decoded image."""
        return self.channels * self.height * self.width

    def name_of(self, index: int) -> str:
        """What to call an image in an error, without the root."""
        if self.pieces is None:
            return self.files[index].path
        return f"{self.files[self.pieces.file[index]].path}, image at byte {self.pieces.start[index]}"

    def all_pieces(self) -> ByteRanges:
        """Where in the files the images lie, also if each file is an image."""
        if self.pieces is not None:
            return self.pieces
        count = len(self.files)
        paths = [self.root / file.path for file in self.files]
        return ByteRanges(paths, np.arange(count), np.zeros(count), [file.size for file in self.files])

    def encoded_sizes(self) -> npt.NDArray[np.int64]:
        """Bytes of each image as it is in its file, int64 [N]."""
        return np.array([file.size for file in self.files], np.int64) if self.pieces is None else self.pieces.size

    def sizes(self) -> dict[str, int]:
        """Bytes of each file of the cache but ``meta.json``."""
        sizes = {_MOMENTS: self.count * self.channels * _MOMENT_BYTES}
        if self.keeps == PIXELS:
            sizes[_IMAGES] = self.count * self.image_bytes
        elif self.keeps == ENCODED:
            sizes[_ENCODED] = int(self.encoded_sizes().sum())
            sizes[_SIZES] = self.count * 8
        return sizes

    def digest(self, folder: Path) -> str:
        """The name of this cache in ``folder``.

        If ``folder`` is below the root, the name doesn't depend on the root's path, so that the cache stays valid when
        the root is moved. Otherwise several roots may share the folder, and the name depends on the root's path too.
        """
        root = "" if folder.resolve().is_relative_to(self.root.resolve()) else os.fspath(self.root.resolve())
        digest = hashlib.sha256()
        head = [_FORMAT, root, self.channels, self.height, self.width, self.skip_broken]
        # Caches of pixels keep the name that they had before there were others.
        head += [] if self.keeps == PIXELS else [self.keeps]
        head += [] if self.masks_of is None else ["masks"]
        digest.update(json.dumps(head).encode())
        for file in [*self.files, *(self.masks_of or ())]:
            # A path can't contain the separator, so different lists of files give different byte strings.
            digest.update(os.fsencode(file.path) + b"\0%d\0%d\0" % (file.size, file.mtime_ns))
        if self.pieces is not None:
            for numbers in (self.pieces.file, self.pieces.start, self.pieces.size):
                digest.update(numbers.tobytes())
        return digest.hexdigest()[:24]


@dataclass(frozen=True)
class ImageCache:
    """A complete cache.

    Attributes:
        images: uint8 [N, C, H, W], a read-only memory map of the file; ``None`` if the cache keeps no pixels.
        encoded: Where the encoded images lie, in the cache or in the source's files; ``None`` if it keeps pixels.
        moments: int64 [N, C, 2], sums and sums of squares of each image's pixels; ``None`` if they aren't known.
        broken: Indices of the images that could not be decoded.
    """

    images: Tensor | None
    encoded: ByteRanges | None
    moments: Tensor | None
    broken: tuple[int, ...]

    def __len__(self) -> int:
        kept = self.encoded if self.images is None else self.images
        assert kept is not None
        return len(kept)


def open_or_build(spec: CacheSpec, folder: Path, workers: int | None) -> ImageCache:
    """Opens the cache of some image files, and builds it first if it doesn't exist.

    Args:
        spec: What to decode, and how.
        folder: Folder that holds caches.
        workers: Number of decoding processes; ``None``: one for each CPU core that this process may use.

    Raises:
        ConfigError: An image can't be decoded and may not be skipped, there is too little disk space, the folder can't
            be written, or another user may have put the cache there.
    """
    target = folder / spec.digest(folder)
    return cache_folder.open_or_build(
        spec.root,
        target,
        lambda: _open(spec, target),
        lambda built: _build(spec, built, available_cores() if workers is None else max(workers, 1)),
    )


def _open(spec: CacheSpec, target: Path) -> ImageCache | None:
    """Returns the cache if it is complete, else ``None``; checks the files' sizes but not their content."""
    count, shape = spec.count, (spec.channels, spec.height, spec.width)
    try:
        meta = read_json(target / _META, _MAX_META_BYTES)
        complete = all((target / name).stat().st_size == size for name, size in spec.sizes().items())
        broken = tuple(int(index) for index in meta["broken"])
        if not complete or any(not 0 <= index < count for index in broken):
            return None
        images, encoded = None, None
        if spec.keeps == PIXELS:
            # Not torch.from_file: its private memory map can't be larger than the host's memory.
            pixels = np.memmap(target / _IMAGES, dtype=np.uint8, mode="r", shape=(count, *shape))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # the tensor is meant to be read-only
                images = torch.from_numpy(pixels)
        elif spec.keeps == ENCODED:
            sizes = np.fromfile(target / _SIZES, dtype=np.int64)
            if (sizes != spec.encoded_sizes()).any():
                return None
            encoded = end_to_end(target / _ENCODED, sizes)
        else:
            encoded = spec.all_pieces()
        moments = torch.from_numpy(np.fromfile(target / _MOMENTS, dtype=np.int64))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return ImageCache(images, encoded, moments.view(count, spec.channels, 2), broken)


def _build(spec: CacheSpec, built: Path, workers: int) -> None:
    built.mkdir()
    sizes = spec.sizes()
    needed, free = sum(sizes.values()), shutil.disk_usage(built).free
    if needed > free:
        problem = f"the cache needs {needed / 2**20:.0f} MiB, and only {free / 2**20:.0f} MiB are free"
        if spec.keeps == PIXELS:
            problem += "; data.cache_format=encoded keeps the images as they are in their files"
        raise ConfigError("data.cache", built.parent.parent, problem)
    for name, size in sizes.items():
        with (built / name).open("wb") as file:
            _allocate(file, size)
    pieces = None
    if spec.pieces is not None or spec.keeps == ENCODED:
        pieces = spec.all_pieces()
    job = {
        "root": os.fspath(spec.root.absolute()),
        "files": [file.path for file in spec.files],
        "masks_of": None if spec.masks_of is None else [file.path for file in spec.masks_of],
        "pieces": None if pieces is None else [pieces.file.tolist(), pieces.start.tolist(), pieces.size.tolist()],
        "height": spec.height,
        "width": spec.width,
        "channels": spec.channels,
        "images": os.fspath((built / _IMAGES).absolute()) if spec.keeps == PIXELS else None,
        "encoded": os.fspath((built / _ENCODED).absolute()) if spec.keeps == ENCODED else None,
        "moments": os.fspath((built / _MOMENTS).absolute()),
    }
    if spec.keeps == ENCODED and pieces is not None:
        pieces.size.tofile(built / _SIZES)

    def refuse_broken(index: int, reason: str) -> None:
        if not spec.skip_broken:
            path = spec.root / spec.name_of(index)
            problem = f"{path} can't be decoded ({reason}); data.on_error=skip leaves such files out"
            raise ConfigError("data.on_error", "stop", problem)

    processes = min(workers, -(-spec.count // decode.CHUNK))
    log.info("decoding %d images into %s with %d processes", spec.count, built.parent.parent, processes)
    broken = decode_processes.run(job, built.parent / "job.json", processes, spec.count, refuse_broken)
    meta = {
        "format": _FORMAT,
        "images": spec.count,
        "shape": [spec.channels, spec.height, spec.width],
        "broken": broken,
        "broken_files": {spec.name_of(index): reason for index, reason in broken.items()},
    }
    (built / _META).write_text(json.dumps(meta, indent=1))


def _allocate(file: IO[bytes], size: int) -> None:
    """Gives a new file its size, with space on the disk for it.

    Workers write it through a memory map, where a disk that turns out to be full ends them by a signal.

    Raises:
        OSError: There is too little space.
    """
    file.truncate(size)
    if not size or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        # Other errors mean that the file system can't reserve space.
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise OSError(error.errno, error.strerror, file.name) from error
