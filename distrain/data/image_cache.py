"""A memory-mapped cache of decoded images, shared by all ranks and jobs of a host.

A cache is a folder whose name is a hash of everything that its content depends on::

    images.u8     uint8 [N, C, H, W]; zeros for an image that can't be decoded
    moments.i64   int64 [N, C, 2], sums and sums of squares of each image's pixels, for the channel statistics
    meta.json     number and shape of the images, and which can't be decoded for what reason

It is built in a temporary folder under a lock, written to disk and then renamed, so that it exists completely or not at
all. Caches are never removed automatically; any may be deleted while no run uses it.

Who may read the image folder may read its caches. Where all users may write (``/tmp``), a cache is its owner's alone,
and one of another user is not trusted.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import distrain
from distrain.data import decode
from distrain.data.build_folder import locked_build_folder, publish
from distrain.errors import ConfigError
from distrain.files.untrusted import read_json

log = logging.getLogger(__name__)
#: Raised when images are decoded to other pixels than before: 2 lays transparent ones over white, inverts a 16-bit TIFF
#: whose 0 is white, and scales one of 12 bits by 12.
_FORMAT = 2
_IMAGES, _MOMENTS, _META = "images.u8", "moments.i64", "meta.json"
_MOMENT_BYTES = 2 * 8
_MAX_META_BYTES = 1 << 30


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
        files: The image files, in the order of the cache.
        channels: 3 for RGB, 1 for greyscale.
        height: Height of the decoded images in pixels.
        width: Width of the decoded images in pixels.
        skip_broken: Whether images that can't be decoded are allowed.
    """

    root: Path
    files: Sequence[ImageFile]
    channels: int
    height: int
    width: int
    skip_broken: bool

    @property
    def image_bytes(self) -> int:
        """Bytes of one decoded image."""
        return self.channels * self.height * self.width

    def digest(self, folder: Path) -> str:
        """The name of this cache in ``folder``.

        If ``folder`` is below the root, the name doesn't depend on the root's path, so that the cache stays valid when
        the root is moved. Otherwise several roots may share the folder, and the name depends on the root's path too.
        """
        root = "" if folder.resolve().is_relative_to(self.root.resolve()) else os.fspath(self.root.resolve())
        digest = hashlib.sha256()
        head = [_FORMAT, root, self.channels, self.height, self.width, self.skip_broken]
        digest.update(json.dumps(head).encode())
        for file in self.files:
            # A path can't contain the separator, so different lists of files give different byte strings.
            digest.update(os.fsencode(file.path) + b"\0%d\0%d\0" % (file.size, file.mtime_ns))
        return digest.hexdigest()[:24]


@dataclass(frozen=True)
class ImageCache:
    """A complete cache.

    Attributes:
        images: uint8 [N, C, H, W], a read-only memory map of the file.
        moments: int64 [N, C, 2], sums and sums of squares of each image's pixels.
        broken: Indices of the images that could not be decoded.
    """

    images: Tensor
    moments: Tensor
    broken: tuple[int, ...]


def open_or_build(spec: CacheSpec, folder: Path, workers: int | None) -> ImageCache:
    """Opens the cache of some image files, and builds it first if it doesn't exist.

    If several processes call this at the same time, one of them builds the cache while the others wait.

    Args:
        spec: What to decode, and how.
        folder: Folder that holds caches.
        workers: Number of decoding processes; ``None``: one for each CPU core that this process may use.

    Raises:
        ConfigError: An image can't be decoded and may not be skipped, there is too little disk space, the folder can't
            be written, or another user may have put the cache there.
    """
    target = folder / spec.digest(folder)
    try:
        _check_owner(spec, folder, target)
        cache = _open_or_build(spec, folder, target, workers)
    except OSError as error:
        raise ConfigError("data.cache", folder, f"{error.filename or target}: {error.strerror or error}") from error
    if cache is None:
        raise ConfigError("data.cache", folder, f"{target.name} was damaged or deleted right after it was built")
    return cache


def _open_or_build(spec: CacheSpec, folder: Path, target: Path, workers: int | None) -> ImageCache | None:
    cache = _open(spec, target)
    if cache is None:
        with locked_build_folder("data.cache", folder) as temporary:
            cache = _open(spec, target)  # another process may have built it meanwhile
            if cache is None:
                if target.exists():
                    log.warning("removing %s, which is damaged", target)
                    shutil.rmtree(target)
                built = temporary / "cache"
                _build(spec, built, workers or _available_cores())
                _restrict_readers(spec, folder, built)
                publish(built, target)
                cache = _open(spec, target)
    return cache


def _check_owner(spec: CacheSpec, folder: Path, target: Path) -> None:
    """Refuses a cache of an unknown user in a folder where all users may write.

    Raises:
        ConfigError: There is such a cache.
    """
    if not hasattr(os, "geteuid"):
        return  # Windows tells no owner by number
    if not (folder.is_dir() and os.path.lexists(target) and _is_writable_by_all(folder)):
        return
    owner = target.lstat().st_uid
    if owner not in (os.geteuid(), 0, spec.root.stat().st_uid):
        problem = f"{target.name} belongs to another user (uid {owner}), and all users may write to this folder"
        raise ConfigError("data.cache", folder, f"{problem}; name another one")


def _restrict_readers(spec: CacheSpec, folder: Path, built: Path) -> None:
    """Lets others read a new cache only if they may read the image folder, and never where all users may write."""
    others = 0 if _is_writable_by_all(folder) else spec.root.stat().st_mode & 0o077
    for path in (built, *built.iterdir()):
        mode = stat.S_IMODE(path.stat().st_mode)
        # Some file systems have no permissions to set; there they already agree.
        if mode & ~(0o700 | others):
            path.chmod(mode & (0o700 | others))


def _is_writable_by_all(folder: Path) -> bool:
    return bool(folder.stat().st_mode & stat.S_IWOTH)


def _open(spec: CacheSpec, target: Path) -> ImageCache | None:
    """Returns the cache if it is complete, else ``None``; checks the files' sizes but not their content."""
    count, shape = len(spec.files), (spec.channels, spec.height, spec.width)
    try:
        meta = read_json(target / _META, _MAX_META_BYTES)
        complete = (target / _IMAGES).stat().st_size == count * spec.image_bytes
        complete = complete and (target / _MOMENTS).stat().st_size == count * spec.channels * _MOMENT_BYTES
        broken = tuple(int(index) for index in meta["broken"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    if not complete or any(not 0 <= index < count for index in broken):
        return None
    # Not torch.from_file: its private memory map can't be larger than the host's memory.
    pixels = np.memmap(target / _IMAGES, dtype=np.uint8, mode="r", shape=(count, *shape))
    moments = torch.from_numpy(np.fromfile(target / _MOMENTS, dtype=np.int64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the tensor is meant to be read-only
        images = torch.from_numpy(pixels)
    return ImageCache(images, moments.view(count, spec.channels, 2), broken)


def _build(spec: CacheSpec, built: Path, workers: int) -> None:
    built.mkdir()
    sizes = {_IMAGES: spec.image_bytes, _MOMENTS: spec.channels * _MOMENT_BYTES}
    needed, free = len(spec.files) * sum(sizes.values()), shutil.disk_usage(built).free
    if needed > free:
        problem = f"the cache needs {needed / 2**20:.0f} MiB, and only {free / 2**20:.0f} MiB are free"
        raise ConfigError("data.cache", built.parent.parent, problem)
    for name, size in sizes.items():
        with (built / name).open("wb") as file:
            _allocate(file, len(spec.files) * size)
    job = built.parent / "job.json"
    job.write_text(
        json.dumps(
            {
                "root": os.fspath(spec.root.absolute()),
                "files": [file.path for file in spec.files],
                "height": spec.height,
                "width": spec.width,
                "channels": spec.channels,
                "images": os.fspath((built / _IMAGES).absolute()),
                "moments": os.fspath((built / _MOMENTS).absolute()),
            }
        )
    )
    count = min(workers, -(-len(spec.files) // decode.CHUNK))
    log.info("decoding %d images into %s with %d processes", len(spec.files), built.parent.parent, count)
    broken = _decode(spec, job, count)
    meta = {
        "format": _FORMAT,
        "images": len(spec.files),
        "shape": [spec.channels, spec.height, spec.width],
        "broken": broken,
        "broken_files": {spec.files[index].path: reason for index, reason in broken.items()},
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


def _decode(spec: CacheSpec, job: Path, count: int) -> dict[int, str]:
    """Runs ``count`` workers; returns the index and reason of each file that can't be decoded, in order."""
    reader, writer = os.pipe()
    # Workers must import this package, and no modules from the current folder, which may be a folder of untrusted
    # images. Python 3.10 ignores PYTHONSAFEPATH, so the workers' current folder is changed too.
    source = os.fspath(Path(distrain.__file__).resolve().parent.parent)
    paths = [os.fspath(Path(part).absolute()) for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([source, *paths]),
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": "1",
    }
    workers: list[subprocess.Popen[bytes]] = []
    with os.fdopen(reader, "rb") as lines:
        try:
            try:
                for index in range(count):
                    command = [sys.executable, "-m", decode.__name__, os.fspath(job.absolute()), str(index), str(count)]
                    worker = subprocess.Popen(  # noqa: S603
                        command, stdin=subprocess.DEVNULL, stdout=writer, env=environment, cwd=source
                    )
                    workers.append(worker)
            finally:
                os.close(writer)
            broken = _collect_reports(spec, lines)
            codes = [worker.wait() for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
    if any(codes):
        raise ConfigError("data.workers", count, f"a decoding process ended with exit code {next(filter(None, codes))}")
    return dict(sorted(broken.items()))


def _collect_reports(spec: CacheSpec, lines: IO[bytes]) -> dict[int, str]:
    """Reads the workers' messages until all workers have ended; returns the reasons of broken files by index."""
    broken: dict[int, str] = {}
    with tqdm(desc="decoding", total=len(spec.files), unit="image", disable=None) as bar:
        for line in lines:
            message: dict[str, Any] = json.loads(line)
            bar.update(message.get("done", 0))
            if "failed" in message:
                raise ConfigError("data.cache", spec.root, f"a decoding process failed ({message['failed']})")
            if "broken" in message:
                broken[message["broken"]] = message["reason"]
                if not spec.skip_broken:
                    path = spec.root / spec.files[message["broken"]].path
                    problem = f"{path} can't be decoded ({message['reason']}); data.on_error=skip leaves such files out"
                    raise ConfigError("data.on_error", "stop", problem)
    return broken


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
