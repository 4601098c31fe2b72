"""CIFAR-10 (Krizhevsky, "Learning multiple layers of features from tiny images", 2009), from its binary files."""

from __future__ import annotations

import hashlib
import http.client
import logging
import tarfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from typing_extensions import override

from distrain.config.groups import DataConfig
from distrain.config.registry import register
from distrain.config.setting import setting
from distrain.data import chosen_classes
from distrain.data.base import DataSource, DataSpec, Images, Splits, assemble, check_shared_keys, refusing_unreadable
from distrain.data.build_folder import locked_build_folder, publish
from distrain.errors import ConfigError, config_error

log = logging.getLogger(__name__)

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
FOLDER = "cifar-10-batches-bin"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_SHAPE = (3, 32, 32)
_RECORD = 1 + 3 * 32 * 32  # bytes: the label, then the red, green and blue planes
#: Images per file.
BATCH_IMAGES = 10_000
_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
_TEST = "test_batch.bin"
_NAMES = "batches.meta.txt"
_FILES = (*_TRAIN, _TEST, _NAMES)
#: Limits in bytes.
_MAX_TEXT, _MAX_ARCHIVE = 1 << 16, 1 << 28
#: Bytes that are downloaded at a time.
_BLOCK = 1 << 20
_TIMEOUT_SECONDS = 60


@dataclass
class Cifar10Config(DataConfig):
    """Keys of ``data=cifar10``."""

    download: bool = setting("Download the files (170 MB) if they are missing.")
    classes: list[str] | None = setting("Use the images of these classes alone; null: of all.", default=None)


@register("data", "cifar10", Cifar10Config)
class Cifar10(DataSource):
    """50,000 training and 10,000 test images, 3x32x32, of ten classes; always in memory (184 MB)."""

    compatible_keys: ClassVar[frozenset[str]] = DataSource.compatible_keys | {"download"}

    @classmethod
    @override
    def changes_for_evaluation(cls, config: Any, root: str | None) -> dict[str, Any]:
        return {**super().changes_for_evaluation(config, root), "download": False}

    def __init__(self, config: Cifar10Config) -> None:
        self._config = config
        if config.root is None:
            raise ConfigError("data.root", None, f"needs the folder that contains {FOLDER}")
        self._root = Path(config.root)

    def describe(self) -> DataSpec:
        """Returns 3x32x32 and the ten classes.

        Raises:
            ConfigError: A file is missing and may not be downloaded, or has the wrong size.
        """
        folder = self._complete_folder()
        if folder is None and not self._config.download:
            problem = (
                f"lacks {FOLDER} or one of its files; set data.root to the folder that has them, or data.download=true"
            )
            raise ConfigError("data.root", self._config.root, f"{problem} to download them (170 MB)")
        classes = chosen_classes.choose(self._config.classes, self._names(folder))
        return check_shared_keys(self._config, DataSpec(*_SHAPE, classes))

    def load(self) -> Splits:
        """Reads the files; downloads them first if they are missing and ``data.download`` allows it.

        Raises:
            ConfigError: The download failed, or a file is missing or corrupt.
        """
        if self._complete_folder() is None and self._config.download:
            self._download()
        spec, folder = self.describe(), self._complete_folder()
        if folder is None:
            raise ConfigError("data.root", self._config.root, f"lacks {FOLDER} or one of its files")
        with refusing_unreadable(self._root):
            train = [self._read(folder / name) for name in _TRAIN]
            test = Images(*self._read(folder / _TEST))
        images = Images(torch.cat([pixels for pixels, _ in train]), torch.cat([labels for _, labels in train]))
        names = self._names(folder)
        images, test = (chosen_classes.only(split, spec.classes, names) for split in (images, test))
        return assemble(self._config, spec, images, test)

    def _complete_folder(self) -> Path | None:
        """The folder that contains all files; ``None`` if a file is missing.

        Raises:
            ConfigError: A file has the wrong size, or the folder can't be read.
        """
        with refusing_unreadable(self._root):
            for folder in (self._root / FOLDER, self._root):
                if not all((folder / name).is_file() for name in _FILES):
                    continue
                for name in (*_TRAIN, _TEST):
                    size, expected = (folder / name).stat().st_size, BATCH_IMAGES * _RECORD
                    if size != expected:
                        problem = f"{name} has {size} bytes, not {expected}; delete it and download it again"
                        raise ConfigError("data.root", folder, problem)
                return folder
        return None

    def _names(self, folder: Path | None) -> tuple[str, ...]:
        """Names of the ten classes."""
        if folder is None:
            return CLASSES
        with refusing_unreadable(self._root):
            return self._classes(folder / _NAMES)

    @staticmethod
    def _classes(path: Path) -> tuple[str, ...]:
        with path.open("rb") as file:
            content = file.read(_MAX_TEXT)
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            # Other bytes may have ten lines too.
            raise config_error("data.root", f"{path} isn't text in UTF-8") from error
        names = tuple(line.strip() for line in text.splitlines() if line.strip())
        if len(names) != len(CLASSES):
            raise config_error("data.root", f"{path} names {len(names)} classes, not {len(CLASSES)}")
        return names

    @staticmethod
    def _read(path: Path) -> tuple[Tensor, Tensor]:
        """Pixels, uint8 [N, 3, 32, 32], and classes, int64 [N], of one file."""
        records = np.fromfile(path, dtype=np.uint8)
        if records.size != BATCH_IMAGES * _RECORD:
            raise config_error("data.root", f"{path} changed while it was read")
        records = records.reshape(-1, _RECORD)
        if records[:, 0].max() >= len(CLASSES):
            row = int(records[:, 0].argmax())
            problem = f"{path.name} is corrupt: record {row} has label {records[row, 0]}, and labels are 0 to 9"
            raise ConfigError("data.root", path.parent, problem)
        pixels = torch.from_numpy(records[:, 1:].reshape(-1, *_SHAPE))
        return pixels, torch.from_numpy(records[:, 0].astype(np.int64))

    def _download(self) -> None:
        with locked_build_folder("data.root", self._root) as temporary:
            if self._complete_folder() is not None:
                return  # another process downloaded them while this one waited for the lock
            archive = temporary / "archive.tar.gz"
            _download_archive(archive)
            unpacked = _unpack(archive, temporary / "files")
            target = self._root / FOLDER
            target.mkdir(exist_ok=True)
            for path in unpacked:
                publish(path, target / path.name)
            log.info("CIFAR-10 is in %s", target)


def _download_archive(archive: Path) -> None:
    """Downloads the archive and checks its checksum."""
    digest = hashlib.md5(usedforsecurity=False)  # the only checksum that is published
    try:
        with urllib.request.urlopen(URL, timeout=_TIMEOUT_SECONDS) as response, archive.open("wb") as file:
            length = response.headers.get("Content-Length")
            total = int(length) if length else None
            with tqdm(desc="CIFAR-10", total=total, unit="B", unit_scale=True, disable=None) as bar:
                while block := response.read(_BLOCK):
                    if file.tell() + len(block) > _MAX_ARCHIVE:
                        raise ConfigError("data.download", True, f"{URL} sends more than {_MAX_ARCHIVE} bytes")
                    file.write(block)
                    digest.update(block)
                    bar.update(len(block))
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise ConfigError("data.download", True, f"{URL} can't be downloaded ({reason})") from error
    if digest.hexdigest() != MD5:
        raise ConfigError("data.download", True, f"{URL} has MD5 {digest.hexdigest()}, not {MD5}; nothing was unpacked")


def _unpack(archive: Path, folder: Path) -> list[Path]:
    """Extracts the known files only; no name in the archive determines where a file is written."""
    folder.mkdir()
    extracted: dict[str, Path] = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = member.name.rpartition("/")[2]
                if member.name != f"{FOLDER}/{name}" or name not in _FILES:
                    continue
                max_size = _MAX_TEXT if name == _NAMES else BATCH_IMAGES * _RECORD
                content = tar.extractfile(member) if member.isreg() and member.size <= max_size else None
                if content is None:
                    problem = f"{URL} contains {member.name}, which is not a plain file of the expected size"
                    raise ConfigError("data.download", True, problem)
                extracted[name] = folder / name
                extracted[name].write_bytes(content.read())
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ConfigError("data.download", True, f"{URL} can't be unpacked ({error})") from error
    if absent := [name for name in _FILES if name not in extracted]:
        raise ConfigError("data.download", True, f"{URL} lacks {', '.join(absent)}")
    return list(extracted.values())
