"""Which image files a prediction is for, in their order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from distrain.data.decode import SUFFIXES
from distrain.errors import ConfigError


def find_images(setting: object) -> list[str]:
    """The image files that ``input`` names: given files, and all JPEG and PNG files below given folders, by name.

    Hidden files and folders are left out, and links to folders are not followed.

    Args:
        setting: A path or a list of paths.

    Raises:
        ConfigError: A path does not exist, a folder has no images, or ``setting`` is something else.
    """
    paths = setting if isinstance(setting, list) else [setting]
    if not paths or any(isinstance(path, dict | list) or path in (None, "") for path in paths):
        raise ConfigError("input", setting, "must be an image file, a folder, or a list of them")
    images: list[str] = []
    for name in map(str, paths):
        path = Path(name)
        if path.is_dir():
            below = list(_images_below(path))
            if not below:
                raise ConfigError("input", name, f"the folder has no {', '.join(SUFFIXES)} files")
            images += below
        elif path.exists():
            images.append(os.fspath(path))
        else:
            raise ConfigError("input", name, "is neither a file nor a folder")
    return images


def _images_below(folder: Path) -> Iterator[str]:
    def fail(error: OSError) -> None:
        raise ConfigError("input", error.filename, f"can't be read ({error.strerror})") from error

    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = os.path.join(parent, name)  # noqa: PTH118 - keeps names that are not UTF-8, and a leading ./
            # Opening a pipe that has the name of an image would block.
            if name.lower().endswith(SUFFIXES) and not name.startswith(".") and Path(path).is_file():
                yield path
