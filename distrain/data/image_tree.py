"""Finds the images of a tree of folders: its parts, its classes and their files, and what is left out."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from distrain.data.decode import SUFFIXES
from distrain.data.image_cache import ImageFile
from distrain.errors import ConfigError, config_error

log = logging.getLogger(__name__)

#: Names that a part's folder may have, in any case.
PART_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
LAYOUT = "the folder must hold train/CLASS/ and test/CLASS/ (and perhaps val/CLASS/), or CLASS/ directly"
#: Folders that operating systems and storage devices make, in lower case; the pictures in them are copies.
_SYSTEM_FOLDERS = ("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found")
#: How many kinds of files and how many folders a line names.
_NAMED = 4


def part_named(name: str) -> str | None:
    """The part that a folder, tar or cell of this name belongs to; ``None`` if the name says none."""
    return next((part for part, names in PART_NAMES.items() if name.lower() in names), None)


@dataclass
class Listing:
    """All image files of a tree, and the class of each.

    Attributes:
        files: Image files, part by part and class by class, sorted by path.
        labels: Class of each file.
        parts: Indices of the files of each part.
        left_out: How many files of each suffix are no images.
    """

    files: list[ImageFile] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    parts: dict[str, list[int]] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)

    def summary(self, classes: int) -> str:
        """How many files and images there are, in one line."""
        parts = ", ".join(f"{name} {len(indices):,}" for name, indices in self.parts.items())
        omitted = sum(self.left_out.values())
        line = f"{len(self.files) + omitted:,} files, {len(self.files):,} images in {classes} classes ({parts})"
        if not omitted:
            return line
        ordered = sorted(self.left_out.items(), key=lambda item: (-item[1], item[0]))
        kinds = [f"{suffix or 'no ending'} {count:,}" for suffix, count in ordered[:_NAMED]]
        more = ", …" if len(self.left_out) > _NAMED else ""
        return f"{line}; left out: {omitted:,} ({', '.join(kinds)}{more})"


class ImageTree:
    """``root/{train,test[,val]}/<class>/**``, or ``root/<class>/**``.

    Classes are numbered in the order of their folders' names. Hidden files and the folders of operating
    systems are ignored. Symbolic links to places outside of the root are not followed.

    Args:
        root: The folder.

    Raises:
        ConfigError: It is no folder, or its parts can't be told apart.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        if not root.is_dir():
            raise ConfigError("data.root", root, "is not a folder")
        #: Folders of train, val and test images, relative to the root; without val or test if there is none.
        self.parts = self._find_parts()
        self.classes = self._folders(self.parts["train"])
        if len(self.classes) < 2:
            place = "" if self.parts["train"] == "." else f" in {self.parts['train']}"
            raise ConfigError("data.root", root, f"needs a folder for each of two or more classes{place}; {LAYOUT}")
        for folder in self.parts.values():
            if unknown := sorted(set(self._folders(folder)) - set(self.classes)):
                raise ConfigError("data.root", root, f"{folder} has a class without training images: {unknown[0]}")

    def list_images(self) -> Listing:
        """Lists all images.

        Raises:
            ConfigError: A class has no training images.
        """
        listing = Listing()
        for part, folder in self.parts.items():
            start = len(listing.files)
            for label, name in enumerate(self.classes):
                files = list(self._images(Path(folder, name), listing.left_out))
                listing.files.extend(files)
                listing.labels.extend([label] * len(files))
                if part == "train" and not files:
                    kinds = ", ".join(SUFFIXES)
                    problem = f"{Path(folder, name)} has no image files ({kinds}); {LAYOUT}"
                    raise ConfigError("data.root", self._root, problem)
            listing.parts[part] = list(range(start, len(listing.files)))
        return listing

    def _find_parts(self) -> dict[str, str]:
        present = self._folders(".")
        parts: dict[str, str] = {}
        for part, names in PART_NAMES.items():
            found = [name for name in present if name.lower() in names]
            if len(found) > 1:
                problem = f"both {found[0]} and {found[1]} could be the {part} images; rename or remove one"
                raise ConfigError("data.root", self._root, problem)
            for path in self._root.iterdir() if not found else ():
                if path.name.lower() in names and path.is_symlink() and path.is_dir():
                    raise ConfigError(
                        "data.root", self._root, f"{path.name} is a symbolic link to outside of the folder"
                    )
            if found:
                parts[part] = found[0]
        others = [name for name in present if name not in parts.values()]
        if "train" in parts:
            if others:
                named = ", ".join(others[:_NAMED]) + (", …" if len(others) > _NAMED else "")
                log.warning("ignoring the folders beside %s in %s: %s", parts["train"], self._root, named)
            return parts
        if parts and not others:
            found_parts = " and ".join(parts.values())
            problem = f"has {found_parts} but no folder of training images (train or training); {LAYOUT}"
            raise ConfigError("data.root", self._root, problem)
        # The classes themselves lie in the root, and one may be called "test" or "valid".
        return {"train": "."}

    def _folders(self, part: str) -> list[str]:
        """Sorted names of the folders in a part; empty if that doesn't exist."""
        folder = self._root / part
        return [entry.name for entry in self._entries(folder) if entry.is_dir()] if folder.is_dir() else []

    def _images(self, folder: Path, left_out: Counter[str]) -> Iterator[ImageFile]:
        """Yields the images below a class's folder, sorted by name in each folder; counts the other files."""
        if not (self._root / folder).is_dir():
            return
        for entry in self._entries(self._root / folder):
            if entry.is_dir():
                # A link to a folder further up would lead round in circles.
                if not entry.is_symlink():
                    yield from self._images(folder / entry.name, left_out)
            elif entry.name.lower().endswith(SUFFIXES) and entry.is_file():
                status = entry.stat()
                yield ImageFile(os.fspath(folder / entry.name), status.st_size, status.st_mtime_ns)
            else:
                left_out[Path(entry.name).suffix.lower()] += 1

    def _entries(self, folder: Path) -> list[os.DirEntry[str]]:
        """Entries of a folder, sorted by name, without hidden ones, system folders and links to outside of the root."""
        result, skipped_links = [], 0
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or entry.name.lower() in _SYSTEM_FOLDERS:
                        continue
                    if entry.is_symlink() and not _is_inside(self._root, Path(entry.path)):
                        skipped_links += 1
                    else:
                        result.append(entry)
        except OSError as error:
            raise config_error("data.root", f"{folder} can't be read ({error.strerror})") from error
        if skipped_links:
            log.warning("ignoring %d symbolic links in %s to outside of %s", skipped_links, folder, self._root)
        return sorted(result, key=lambda entry: entry.name)


def _is_inside(root: Path, path: Path) -> bool:
    return path.resolve().is_relative_to(root.resolve())
