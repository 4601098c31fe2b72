"""data=table: a table with a row for each image file, in CSV, TSV or Parquet."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import os
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from distrain.config.registry import register
from distrain.config.setting import setting
from distrain.data.base import IGNORED, TARGETS, DataSpec, Splits, check_shared_keys, refusing_unreadable
from distrain.data.image_cache import CacheSpec, ImageFile, open_or_build
from distrain.data.image_files import (
    ImageFilesConfig,
    ImageFilesSource,
    LabelledFiles,
    cache_folder,
    classes_too_small,
    load_splits,
    stored_spec,
)
from distrain.data.image_tree import PART_NAMES, part_named
from distrain.data.table_files import Table, read_table
from distrain.data.table_labels import Labels, describe, read_labels
from distrain.data.target_kinds import is_black_and_white, whiten
from distrain.errors import ConfigError

log = logging.getLogger(__name__)
_SPLIT_COLUMN = "split"
#: Most values that a line shows.
_NAMED = 20
_SEPARATORS = ("|", ",", ";", " ")


@dataclass
class TableConfig(ImageFilesConfig):
    """Keys of ``data=table``."""

    images: str | None = setting(
        "Folder that the paths in the table are relative to; null: the table's folder.", path=True
    )
    path_column: str = setting("Column of the paths of the images.")
    label_column: Any = setting("Column of the labels, or a list of columns.")
    split_column: str | None = setting(
        "Column that says train, val or test; null: none. Without it, images are held out."
    )
    label_separator: str | None = setting(
        "What separates several labels in a cell; null: a cell is one label.", choices=(None, *_SEPARATORS)
    )
    target: str | None = setting("Kind of the targets; null: what the cells look like.", choices=(None, *TARGETS))
    classes: list[str] | None = setting("Names of the classes in the order of their numbers; null: those of the table.")


@register("data", "table", TableConfig)
class TableData(ImageFilesSource):
    """A row for each image: its path, its label or labels, and the part that it belongs to."""

    compatible_keys: ClassVar[frozenset[str]] = ImageFilesSource.compatible_keys | {"images"}

    @classmethod
    @override
    def changes_for_evaluation(cls, config: Any, root: str | None) -> dict[str, Any]:
        changes = super().changes_for_evaluation(config, root)
        if root is not None and config.images is not None and not Path(config.images).is_dir():
            changes["images"] = None
        return changes

    @classmethod
    @override
    def changes_for_classes(cls, config: Any, spec: DataSpec) -> dict[str, Any]:
        return {"classes": list(spec.classes), "target": spec.target}

    def __init__(self, config: TableConfig) -> None:
        self._config = config
        if config.root is None:
            raise ConfigError("data.root", None, "needs the table: a file of CSV, TSV or Parquet")
        self._path = Path(config.root)
        self._images = self._path.parent if config.images is None else Path(config.images)
        columns = config.label_column
        self._label_columns = [str(name) for name in (columns if isinstance(columns, list) else [columns])]
        if not self._label_columns or isinstance(columns, dict):
            raise ConfigError("data.label_column", columns, "must be the name of a column, or a list of names")

    def describe(self) -> DataSpec:
        """Reads the table; opens no image.

        Raises:
            ConfigError: It can't be read, a column is missing, or a cell makes no sense.
        """
        c = self._config
        with refusing_unreadable(self._path):
            labels = self._labels
        if not self._images.is_dir():
            raise ConfigError("data.images", self._images, "is not a folder")
        return check_shared_keys(c, DataSpec(c.channels, c.height, c.width, labels.classes, target=labels.kind))

    def load(self) -> Splits:
        """Opens the cache of decoded images; decodes the files first if it doesn't exist.

        Raises:
            ConfigError: A file is missing or can't be decoded and may not be skipped, a mask doesn't fit its image, or
                the cache can't be written.
        """
        spec, labels, column = self.describe(), self._labels, self._config.path_column
        with refusing_unreadable(self._images):
            files = self._find(column)
            masks = self._find(self._label_columns[0]) if labels.kind == "mask" else {}
        rows = [row for row in files if row in masks or labels.kind != "mask"]
        if len(rows) < len(self._table.rows):
            count = len(self._table.rows)
            log.warning("skipped %d of %d rows whose file is missing", count - len(rows), count)
        listed = [files[row] for row in rows]
        if labels.targets is not None:
            targets, broken = labels.targets.index_select(0, torch.tensor(rows, dtype=torch.int64)), set[int]()
        else:
            targets, broken = self._read_masks(spec, rows, listed, [masks[row] for row in rows])
        place = {row: index for index, row in enumerate(rows) if index not in broken}
        parts = {part: [place[row] for row in chosen if row in place] for part, chosen in self._parts.items()}
        splits = load_splits(self._config, spec, LabelledFiles(self._images, listed, targets, parts))
        counts = ", ".join(f"{part} {len(chosen):,}" for part, chosen in parts.items())
        notes = [f"{len(rows):,} images in {self._path.name} ({counts})", describe(labels, self._label_columns)]
        if labels.kind == "class":
            notes += classes_too_small(spec.classes, targets, parts)
        notes += _repeated(listed, parts)
        return dataclasses.replace(splits, notes=tuple(notes), fingerprint=_fingerprint(listed, parts, labels.targets))

    @functools.cached_property
    def _table(self) -> Table:
        c = self._config
        keys = {c.path_column: "data.path_column"} | dict.fromkeys(self._label_columns, "data.label_column")
        # The usual name need not be there; one that the user chose must be.
        chosen = c.split_column not in (None, _SPLIT_COLUMN)
        if chosen:
            keys |= {str(c.split_column): "data.split_column"}
        return read_table(self._path, list(keys), keys, [] if c.split_column is None else [c.split_column])

    @functools.cached_property
    def _parts(self) -> dict[str, list[int]]:
        """Indices of the rows of each part."""
        table, column = self._table, self._config.split_column
        if column is None or column not in table.columns:
            return {"train": [*range(len(table.rows))]}
        cells = table.columns[column]
        meanings = {cell: part_named(cell) for cell in set(cells)}
        for cell, part in meanings.items():
            if part is None:
                names = ", ".join(name for names in PART_NAMES.values() for name in names)
                raise table.wrong(cells.index(cell), column, f"is {cell or 'empty'}; {names} are known")
        parts: dict[str, list[int]] = {part: [] for part in PART_NAMES if part in meanings.values()}
        if "train" not in parts:
            raise ConfigError("data.root", self._path, f"column {column} has no row for training")
        for row, cell in enumerate(cells):
            parts[str(meanings[cell])].append(row)
        return parts

    @functools.cached_property
    def _labels(self) -> Labels:
        c = self._config
        return read_labels(
            self._table,
            self._label_columns,
            self._parts["train"],
            kind=c.target,
            separator=c.label_separator,
            classes=c.classes,
        )

    def _find(self, column: str) -> dict[int, ImageFile]:
        """The files that a column names, by row; those that are missing are left out if ``on_error`` says so.

        Raises:
            ConfigError: A cell is empty, or names no file below the folder of images.
        """
        table, root, found = self._table, self._images, {}
        inside, folder = _Inside(root), os.fspath(root)
        for row, cell in enumerate(table.columns[column]):
            if not cell:
                raise table.wrong(row, column, "is empty; the path of a file is needed")
            path = self._relative(row, column, cell)
            place = f"{folder}{os.sep}{path}"
            try:
                # One look at each file: there may be a million. Few are links, which are followed.
                status = os.lstat(place)
                is_link = stat.S_ISLNK(status.st_mode)
                status = os.stat(place) if is_link else status  # noqa: PTH116
            except (FileNotFoundError, NotADirectoryError):
                if self._config.on_error == "skip":
                    continue
                hint = "" if self._config.images is not None else "; data.images=FOLDER says where the images are"
                raise table.wrong(row, column, f"{cell} is not in {root}{hint}") from None
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else str(error)
                raise table.wrong(row, column, f"{cell[:200]} can't be read ({reason})") from error
            if not stat.S_ISREG(status.st_mode):
                raise table.wrong(row, column, f"{cell} is no file")
            if not inside.holds(path, is_link=is_link):
                raise table.wrong(row, column, f"{cell} is a symbolic link to outside of {root}")
            found[row] = ImageFile(path, status.st_size, status.st_mtime_ns)
        if not found:
            raise ConfigError("data.root", self._path, f"none of the files in column {column} is in {root}")
        return found

    def _relative(self, row: int, column: str, cell: str) -> str:
        """A path as in a cell, relative to the folder of images."""
        path = os.path.normpath(cell)
        if os.path.isabs(path):  # noqa: PTH117 - a million times
            path = os.path.relpath(path, self._images.absolute())
        if path == ".." or path.startswith(f"..{os.sep}"):
            problem = f"{cell} is outside of {self._images}; data.images=FOLDER names a folder that holds all images"
            raise self._table.wrong(row, column, problem)
        return path

    def _read_masks(
        self, spec: DataSpec, rows: Sequence[int], files: Sequence[ImageFile], masks: Sequence[ImageFile]
    ) -> tuple[Tensor, set[int]]:
        """Masks as uint8 [N, H, W], and the indices of those that can't be decoded and may be skipped."""
        c, column = self._config, self._label_columns[0]
        skips = c.on_error == "skip"
        stored = stored_spec(c, spec)
        recipe = CacheSpec(self._images, masks, 1, stored.height, stored.width, skips, masks_of=files)
        cache = open_or_build(recipe, cache_folder(c, self._images), c.workers)
        if cache.broken:
            log.warning("skipped %d of %d masks that can't be decoded", len(cache.broken), len(masks))
        assert cache.images is not None
        numbers = cache.images[:, 0]
        if len(spec.classes) == 2 and is_black_and_white([numbers]):
            return whiten(numbers), set(cache.broken)
        wrong = ((numbers >= len(spec.classes)) & (numbers != IGNORED)).flatten(1).any(1)
        if bool(wrong.any()):
            index = int(wrong.nonzero()[0])
            values = ", ".join(map(str, numbers[index].unique().tolist()[:_NAMED]))
            problem = f"{masks[index].path} holds {values}; data.classes names {len(spec.classes)}, from 0 on"
            raise self._table.wrong(rows[index], column, problem)
        return numbers, set(cache.broken)


class _Inside:
    """Tells whether files are below a folder, also where symbolic links lead elsewhere.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self._root, self._resolved = root, root.resolve()
        self._folders: dict[str, bool] = {}

    def holds(self, path: str, *, is_link: bool) -> bool:
        """Whether a file is below the folder.

        Args:
            path: The file, relative to the folder.
            is_link: Whether it is a symbolic link itself.
        """
        folder = os.path.dirname(path)  # noqa: PTH120 - a million times
        if folder not in self._folders:
            self._folders[folder] = (self._root / folder).resolve().is_relative_to(self._resolved)
        return self._folders[folder] and (not is_link or (self._root / path).resolve().is_relative_to(self._resolved))


def _repeated(files: Sequence[ImageFile], parts: Mapping[str, Sequence[int]]) -> list[str]:
    """Says if images are in several rows, above all in several parts: they would be tested on what was trained."""
    counts = Counter(file.path for file in files)
    notes = []
    if len(counts) < len(files):
        path, count = counts.most_common(1)[0]
        notes.append(
            f"images in several rows: {sum(count > 1 for count in counts.values()):,}, such as {path} ({count})"
        )
    paths = {part: {files[row].path for row in rows} for part, rows in parts.items()}
    for part in ("val", "test"):
        shared = sorted(paths["train"] & paths.get(part, set()))
        if shared:
            notes.append(f"images for training that are also in {part}: {len(shared):,}, such as {shared[0]}")
    return notes


def _fingerprint(files: Sequence[ImageFile], parts: Mapping[str, Sequence[int]], targets: Tensor | None) -> str:
    """Differs if other files are listed, in another order, in other parts or with other labels."""
    digest = hashlib.blake2b("\0".join(file.path for file in files).encode(errors="surrogateescape"), digest_size=16)
    for part, rows in parts.items():
        digest.update(part.encode() + np.asarray(rows, dtype=np.int64).tobytes())
    if targets is not None:
        digest.update(targets.numpy().tobytes())
    return digest.hexdigest()
