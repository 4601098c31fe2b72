"""A folder of caches that several processes, jobs and perhaps users share: each cache is complete or absent.

A cache is a folder whose name is a hash of everything that its content depends on. It is built in a temporary folder
under a lock, written to disk and then renamed. Caches are never removed automatically; any may be deleted while no run
uses it.

Who may read the source of a cache may read the cache. Where all users may write (``/tmp``), a cache is its owner's
alone, and one of another user is not trusted.
"""

from __future__ import annotations

import logging
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from distrain.data.build_folder import locked_build_folder, publish
from distrain.errors import ConfigError

T = TypeVar("T")
log = logging.getLogger(__name__)
#: The configuration key that names the folder, for error messages.
_KEY = "data.cache"


def open_or_build(source: Path, target: Path, open_cache: Callable[[], T | None], build: Callable[[Path], None]) -> T:
    """Opens a cache, and builds it first if it doesn't exist or is damaged.

    If several processes call this at the same time, one of them builds the cache while the others wait.

    Args:
        source: The folder that the cache is made from.
        target: The cache.
        open_cache: Opens ``target``; returns ``None`` if it is not complete.
        build: Makes the cache as the folder that it is given, which doesn't exist yet. Beside it is room for other
            files, which are removed at the end.

    Raises:
        ConfigError: ``build`` refuses to build it, the folder can't be written, or another user may have put the cache
            there.
    """
    folder = target.parent
    try:
        _check_owner(source, target)
        cache = open_cache()
        if cache is None:
            with locked_build_folder(_KEY, folder) as temporary:
                cache = open_cache()  # another process may have built it meanwhile
                if cache is None:
                    if target.exists():
                        log.warning("removing %s, which is damaged", target)
                        shutil.rmtree(target)
                    built = temporary / "cache"
                    build(built)
                    _restrict_readers(source, folder, built)
                    publish(built, target)
                    cache = open_cache()
    except OSError as error:
        raise ConfigError(_KEY, folder, f"{error.filename or target}: {error.strerror or error}") from error
    if cache is None:
        raise ConfigError(_KEY, folder, f"{target.name} was damaged or deleted right after it was built")
    return cache


def _check_owner(source: Path, target: Path) -> None:
    """Refuses a cache of an unknown user in a folder where all users may write.

    Raises:
        ConfigError: There is such a cache.
    """
    if not hasattr(os, "geteuid"):
        return  # Windows tells no owner by number
    folder = target.parent
    if not (folder.is_dir() and os.path.lexists(target) and _is_writable_by_all(folder)):
        return
    owner = target.lstat().st_uid
    if owner not in (os.geteuid(), 0, source.stat().st_uid):
        problem = f"{target.name} belongs to another user (uid {owner}), and all users may write to this folder"
        raise ConfigError(_KEY, folder, f"{problem}; name another one")


def _restrict_readers(source: Path, folder: Path, built: Path) -> None:
    """Lets others read a new cache only if they may read its source, and never where all users may write."""
    others = 0 if _is_writable_by_all(folder) else source.stat().st_mode & 0o077
    for path in (built, *built.iterdir()):
        mode = stat.S_IMODE(path.stat().st_mode)
        # Some file systems have no permissions to set; there they already agree.
        if mode & ~(0o700 | others):
            path.chmod(mode & (0o700 | others))


def _is_writable_by_all(folder: Path) -> bool:
    return bool(folder.stat().st_mode & stat.S_IWOTH)
