"""A folder for caches of this user, also where there is no home folder: in containers with an unknown user, say."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path


class UntrustedFolder(OSError):
    """A folder that other users could have prepared; the message names it and the reason in one line."""


def user_cache_folder() -> Path:
    """Returns ``$XDG_CACHE_HOME/distrain``, else ``~/.cache/distrain``, else a folder among the temporary files.

    The last one is this user's own. It is used if there is no home folder or it can't be written. All processes of the
    user get the same folder.

    Raises:
        UntrustedFolder: The temporary folder exists but belongs to another user, or others may write to it.
    """
    configured = os.environ.get("XDG_CACHE_HOME")
    if configured:
        return Path(configured, "distrain")
    try:
        cache = Path.home() / ".cache"
    except RuntimeError:  # no HOME, and the user is not in the password file
        return _temporary_folder()
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    # A container may name "/" as the home of a user that it does not know.
    return cache / "distrain" if os.access(existing, os.W_OK) else _temporary_folder()


def _temporary_folder() -> Path:
    if not hasattr(os, "getuid"):
        # On Windows each user has their own folder for temporary files.
        folder = Path(tempfile.gettempdir(), "distrain")
        folder.mkdir(exist_ok=True)
        return folder
    folder = Path(tempfile.gettempdir(), f"distrain-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    # The name is known to everybody, so somebody else may have made the folder to have us read their files.
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise UntrustedFolder(f"{folder} exists and is not a folder that only this user may write to")
    return folder
