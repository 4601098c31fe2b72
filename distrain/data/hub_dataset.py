"""Opens data sets of the Hugging Face library ``datasets``, from a folder or the hub, and copies their encoded images.

The library is imported when it is needed: it is an extra, and takes seconds to import.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from distrain.data import cache_folder
from distrain.data.byte_ranges import ByteRanges, end_to_end
from distrain.data.decode import LARGEST_FILE, SUFFIXES
from distrain.errors import ConfigError, config_error, first_line
from distrain.files.untrusted import open_regular, read_json

log = logging.getLogger(__name__)
_FORMAT = 1
_ENCODED, _SIZES, _META = "encoded.bin", "sizes.i64", "meta.json"
_MAX_META_BYTES = 1 << 16
#: Rows that are copied at a time.
_ROWS = 64
#: Seconds to wait for the hub.
_PATIENCE = 20.0


@dataclass(frozen=True)
class HubPlace:
    """Where a data set is.

    Attributes:
        path: A folder, or a name on the hub such as ``user/name``.
        subset: One of several data sets at that place.
        revision: Branch, tag or commit on the hub.
        download: Whether the hub may be asked; else only what was downloaded before is used.
    """

    path: str
    subset: str | None
    revision: str | None
    download: bool

    @property
    def folder(self) -> Path | None:
        """The local folder, if it is one."""
        return Path(self.path) if Path(self.path).is_dir() else None

    def root(self) -> Path:
        """The folder below which all files of the data set lie."""
        if self.folder is not None:
            return self.folder
        return Path(_library().config.HF_CACHE_HOME)


def open_splits(place: HubPlace) -> dict[str, Any]:
    """The splits of a data set by their names, each a ``datasets.Dataset``.

    A folder is one of ``save_to_disk``, of parquet files, or of images. Nothing that it says is run, and none of its
    settings are read. On the hub, the library reads settings and data files; it runs no code since its release 4.

    Raises:
        ConfigError: The library is missing, there is no such data set, or it can't be read.
    """
    library = _library()
    library.disable_progress_bars()
    with _in_one_line(place):
        if place.folder is not None:
            return _open_folder(library, place.folder)
        return _open_hub(library, place)


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        problem = f"needs the library datasets ({error}); run pip install 'distrain[hf]'"
        raise config_error("data=hf", problem) from error
    return datasets


@contextlib.contextmanager
def _in_one_line(place: HubPlace) -> Iterator[None]:
    """The library raises errors of many kinds, its own and others'; each is said in one line."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        problem = f"can't be opened ({type(error).__name__}: {_first_line(error, 300)})"
        raise ConfigError("data.path", place.path, problem) from error


def _open_folder(library: Any, folder: Path) -> dict[str, Any]:
    if (folder / "dataset_dict.json").is_file():
        return dict(library.load_from_disk(str(folder)))
    if (folder / "state.json").is_file():
        return {"train": library.load_from_disk(str(folder))}
    files: dict[str, list[str]] = {}
    for path in sorted((*folder.glob("*.parquet"), *folder.glob("*/*.parquet"), *folder.glob("*/*/*.parquet"))):
        relative = path.relative_to(folder)
        if not any(part.startswith(".") for part in relative.parts):
            if not path.resolve().is_relative_to(folder.resolve()):
                raise ConfigError("data.path", folder, f"{relative} is a link to outside of the folder")
            files.setdefault(_split_of(PurePosixPath(relative.as_posix())), []).append(str(path.absolute()))
    if files:
        return dict(library.load_dataset("parquet", data_files=files))
    scripts = [path.name for path in folder.glob("*.py")]
    if scripts and not any(path.is_dir() for path in folder.iterdir()):
        raise ConfigError("data.path", folder, f"holds {scripts[0]}, a script that would load it; no code of it is run")
    if not any(path.suffix.lower() in SUFFIXES for path in folder.rglob("*")):
        problem = "holds neither what save_to_disk writes, nor parquet files, nor images"
        raise ConfigError("data.path", folder, problem)
    return dict(library.load_dataset("imagefolder", data_dir=str(folder.absolute())))


def _split_of(path: PurePosixPath) -> str:
    """The split of a parquet file: ``train-00000-of-00003.parquet``, ``train.parquet`` or ``train/0.parquet``."""
    name = re.sub(r"([-_.]?\d+(-of-\d+)?)$", "", path.stem)
    return name or (path.parent.name or "train")


def _open_hub(library: Any, place: HubPlace) -> dict[str, Any]:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", place.path) or place.path.startswith("."):
        raise ConfigError("data.path", place.path, "is neither a folder nor a name on the hub (user/name)")
    import huggingface_hub

    online = place.download and not library.config.HF_HUB_OFFLINE
    if online:
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of each attempt
        try:
            huggingface_hub.HfApi().dataset_info(place.path, revision=place.revision, timeout=_PATIENCE)
        except huggingface_hub.errors.HfHubHTTPError as error:
            problem = f"is no folder, and the hub has no such data set, or only for its members ({_first_line(error)})"
            raise ConfigError("data.path", place.path, problem) from error
        except Exception as error:  # of whatever library makes the connection
            log.warning("the hub can't be reached (%s); using what was downloaded before", _first_line(error))
            online = False
    with _offline(library, huggingface_hub, not online):
        try:
            return dict(library.load_dataset(place.path, place.subset, revision=place.revision))
        except Exception as error:
            if online:
                raise
            why = "data.download=false" if not place.download else "the hub can't be reached"
            problem = f"is no folder, and was not downloaded before; {why} ({_first_line(error)})"
            raise ConfigError("data.path", place.path, problem) from error


def _first_line(error: Exception, length: int = 200) -> str:
    return (first_line(error) or type(error).__name__)[:length]


@contextlib.contextmanager
def _offline(library: Any, hub: Any, offline: bool) -> Iterator[None]:
    """Inside this block the libraries ask nobody, if so wanted."""
    places = (library.config, hub.constants)
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = place.HF_HUB_OFFLINE or offline
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def copied_images(place: HubPlace, splits: Mapping[str, Any], column: str, folder: Path) -> ByteRanges:
    """The encoded images of all splits, one after the other in a file below a folder of caches; copied once.

    Args:
        place: Where the data set is.
        splits: Its splits, of which the images are wanted.
        column: Name of the column of images.
        folder: The folder of caches.

    Raises:
        ConfigError: The cache can't be written, or an image's file lies outside of the data set.
    """
    rows = sum(len(split) for split in splits.values())
    fingerprints = [split._fingerprint for split in splits.values()]
    content = json.dumps(["hf", _FORMAT, place.path, place.subset, place.revision, column, rows, fingerprints])
    target = folder / hashlib.sha256(content.encode()).hexdigest()[:24]
    return cache_folder.open_or_build(
        place.root(),
        target,
        lambda: _open_copy(target, rows),
        lambda built: _copy(place, splits, column, built),
    )


def _open_copy(target: Path, rows: int) -> ByteRanges | None:
    try:
        meta = read_json(target / _META, _MAX_META_BYTES)
        sizes = np.fromfile(target / _SIZES, dtype=np.int64)
        total = (target / _ENCODED).stat().st_size
        if meta["rows"] != rows or len(sizes) != rows or (sizes < 0).any() or int(sizes.sum()) != total:
            return None
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return end_to_end(target / _ENCODED, sizes)


def _copy(place: HubPlace, splits: Mapping[str, Any], column: str, built: Path) -> None:
    library = _library()
    built.mkdir()
    rows = sum(len(split) for split in splits.values())
    log.info("copying %d images of %s into %s", rows, place.path, built.parent.parent)
    sizes: list[int] = []
    with (built / _ENCODED).open("wb") as file:
        for split in splits.values():
            images = split.select_columns([column]).cast_column(column, library.Image(decode=False))
            for batch in images.iter(batch_size=_ROWS):
                sizes += [_write_image(place, image, file) for image in batch[column]]
    np.array(sizes, dtype=np.int64).tofile(built / _SIZES)
    (built / _META).write_text(json.dumps({"format": _FORMAT, "rows": rows}))


def _write_image(place: HubPlace, image: Mapping[str, Any] | None, file: IO[bytes]) -> int:
    """Writes one encoded image and returns its size; 0 for none, which is then found when it is decoded."""
    if image is None:
        return 0
    data: bytes | None = image["bytes"]
    if data is None and image["path"] is not None:
        path = Path(image["path"])
        if not path.resolve().is_relative_to(place.root().resolve()):
            raise ConfigError("data.path", place.path, f"names an image outside of it, {os.fspath(path)}")
        with open_regular(path) as source:
            data = source.read(LARGEST_FILE + 1)
    return file.write(data or b"")
