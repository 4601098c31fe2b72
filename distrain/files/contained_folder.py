"""A folder whose content a stranger may have prepared: what is done in it never leaves it through a link.

A run folder may come from anywhere, and a link in it could make a run overwrite the file that the link points to. So
each component of a path below the folder is opened relative to the descriptor of the one above it, and never followed
if it is a link. Checking a path first and opening it then would leave time to put a link there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

# Asked once, since functions are compared. Without it, a component is looked at before it is used.
_HAS_DIR_FD = {os.open, os.stat, os.mkdir, os.unlink, os.rmdir, os.rename} <= os.supports_dir_fd
#: For opening a file and not what a link leads to, where the system knows links. O_NONBLOCK: opening a named pipe would
#: wait for its other end. O_BINARY: Windows would change the ends of lines.
OPEN_FLAGS = 0
for _name in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):
    OPEN_FLAGS |= getattr(os, _name, 0)
_FOLDER_FLAGS = os.O_RDONLY | OPEN_FLAGS | getattr(os, "O_DIRECTORY", 0)
#: No folder of a run is nested as deep; a deeper one would exhaust descriptors.
_MAX_DEPTH = 32
_KINDS = (
    (stat.S_ISLNK, "a link"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISREG, "a file"),
)


class UnsafePath(OSError):
    """A path in the folder is a link, a device, a pipe or a socket, or has a second name; one line names it."""


@dataclass(frozen=True)
class ContainedFolder:
    """Reads, writes and removes below a folder, without ever following a link there.

    Names are relative to the folder and use ``/``. Every method raises :class:`UnsafePath` for a name that would lead
    out of the folder or to something that is not a regular file or folder, and other errors as ``OSError`` with the
    whole path.

    Args:
        path: The folder. It may be reached through links, since the user named it.
    """

    path: Path

    def open(self, name: str, flags: int) -> int:
        """Opens a regular file; folders above it must exist.

        Args:
            name: The file.
            flags: As for ``os.open``.

        Returns:
            A descriptor.
        """
        with self._parent_of(name) as (folder, leaf):
            self._refuse_if_unsafe(name, leaf, folder, changes=bool(flags & (os.O_WRONLY | os.O_RDWR)))
            # Truncated only once it is known what was opened.
            descriptor = os.open(leaf, flags & ~os.O_TRUNC | OPEN_FLAGS, 0o666, dir_fd=folder)
            try:
                self._check_opened(name, os.fstat(descriptor), flags)
                if flags & os.O_TRUNC:
                    os.ftruncate(descriptor, 0)
            except OSError:
                os.close(descriptor)
                raise
            return descriptor

    def open_file(self, name: str, mode: str) -> IO[bytes]:
        """Opens a regular file as :func:`open` does.

        Args:
            name: The file.
            mode: ``rb`` or ``wb``.
        """
        flags = os.O_RDONLY if mode == "rb" else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        return os.fdopen(self.open(name, flags), mode)

    def create(self, name: str) -> IO[bytes]:
        """Makes a new file in place of one or of a link with this name, and opens it for writing."""
        with self._parent_of(name) as (folder, leaf):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(leaf, dir_fd=folder)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | OPEN_FLAGS
            return os.fdopen(os.open(leaf, flags, 0o666, dir_fd=folder), "wb")

    def replace_text(self, name: str, content: str) -> None:
        """Writes a text file atomically: readers see the old file or the new one, even if several processes write.

        If it can't be written, the old file stays.
        """
        with self._parent_of(name) as (folder, leaf):
            self._refuse_if_unsafe(name, leaf, folder)
        temporary = str(PurePosixPath(name).with_name(f".{PurePosixPath(name).name}.{os.getpid()}"))
        try:
            with self.create(temporary) as file:
                file.write(content.encode())
            self.rename(temporary, name)
        except OSError as error:
            with contextlib.suppress(OSError):
                self.unlink(temporary, missing_ok=True)
            raise _at(self.path / name, error) from error

    def make_folder(self, name: str) -> None:
        """Makes a folder and those above it, the contained folder itself included; does nothing if they exist."""
        try:
            # The usual case. What exists may also be something else than a folder, which the walk says.
            self.path.mkdir(parents=True, exist_ok=True)
            parts = PurePosixPath(name).parts
            for count in range(1, len(parts) + 1):
                with self._parent_of("/".join(parts[:count])) as (folder, leaf), contextlib.suppress(FileExistsError):
                    os.mkdir(leaf, dir_fd=folder)
            with self._parent_of(f"{name}/-"):
                pass
        except OSError as error:
            raise _at(self.path / name, error) from error

    def rename(self, old: str, new: str) -> None:
        """Renames a file or folder; a file or link with the new name is replaced, and a link's target stays."""
        with self._parent_of(old) as (old_folder, old_leaf), self._parent_of(new) as (new_folder, new_leaf):
            # Windows' rename would not replace a file.
            os.replace(old_leaf, new_leaf, src_dir_fd=old_folder, dst_dir_fd=new_folder)

    def unlink(self, name: str, *, missing_ok: bool = False) -> None:
        """Removes a file, or a link but not its target."""
        with self._parent_of(name) as (folder, leaf):
            try:
                os.unlink(leaf, dir_fd=folder)
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def remove_folder(self, name: str) -> None:
        """Removes an empty folder."""
        with self._parent_of(name) as (folder, leaf):
            os.rmdir(leaf, dir_fd=folder)

    def remove_tree(self, name: str) -> None:
        """Removes a folder with its content; links in it are removed, their targets stay."""
        for entry in self.names(name):
            inner = f"{name}/{entry}"
            if stat.S_ISDIR(self.status(inner).st_mode):
                self.remove_tree(inner)
            else:
                self.unlink(inner, missing_ok=True)
        self.remove_folder(name)

    def names(self, name: str) -> list[str]:
        """The names in a folder, sorted."""
        with self._parent_of(f"{name}/-") as (folder, leaf):
            return sorted(os.listdir(folder if folder is not None else os.path.dirname(leaf)))  # noqa: PTH120, PTH208

    def status(self, name: str) -> os.stat_result:
        """What is there under a name, of a link the link itself."""
        with self._parent_of(name) as (folder, leaf):
            return os.stat(leaf, dir_fd=folder, follow_symlinks=False)

    def exists(self, name: str) -> bool:
        """Whether there is anything under a name, be it a link."""
        try:
            self.status(name)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def is_folder(self, name: str) -> bool:
        """Whether there is a folder under a name; a link to one is none."""
        try:
            return stat.S_ISDIR(self.status(name).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False

    def is_link(self, name: str) -> bool:
        """Whether there is a link under a name, wherever it leads."""
        try:
            return stat.S_ISLNK(self.status(name).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False

    def sync(self, name: str) -> None:
        """Syncs a folder's entries to the disk, so that they survive a crash of the machine."""
        with self._parent_of(f"{name}/-") as (folder, _):
            if folder is not None:
                os.fsync(folder)

    def check(self, names: Iterable[str]) -> None:
        """Checks that nothing under the given names, at any depth, is unsafe to write.

        Args:
            names: Files and folders directly in the folder; those that don't exist are fine.

        Raises:
            UnsafePath: Names the first link, device, pipe or socket, or file with a second name.
            OSError: A folder can't be read.
        """
        for name in names:
            try:
                with self._parent_of(name) as (folder, leaf):
                    self._refuse_if_unsafe(name, leaf, folder)
                if not self.is_folder(name):
                    continue
                self.check(f"{name}/{entry}" for entry in self.names(name))
            except FileNotFoundError:  # removed meanwhile by another start of the run
                continue

    @contextlib.contextmanager
    def _parent_of(self, name: str) -> Iterator[tuple[int | None, str]]:
        """Opens the folder that holds a name; yields its descriptor and the last component.

        Without descriptors of folders, it yields ``None`` and the whole path.
        """
        *folders, leaf = PurePosixPath(name).parts
        if name.startswith("/") or ".." in (*folders, leaf):
            raise UnsafePath(errno.EPERM, f"leads out of {self.path}", str(self.path / name))
        if len(folders) > _MAX_DEPTH:
            raise UnsafePath(errno.ENAMETOOLONG, f"is nested more than {_MAX_DEPTH} deep", str(self.path / name))
        try:
            if not _HAS_DIR_FD:
                for count in range(1, len(folders) + 1):
                    _refuse_link(self.path.joinpath(*folders[:count]), None, str(self.path.joinpath(*folders[:count])))
                yield None, str(self.path / name)
                return
            with contextlib.ExitStack() as stack:
                # The user named the folder itself, so a link there is followed.
                current = os.open(self.path, _FOLDER_FLAGS & ~os.O_NOFOLLOW)
                stack.callback(_close_folder, current)
                for index, part in enumerate(folders):
                    try:
                        inner = os.open(part, _FOLDER_FLAGS, dir_fd=current)
                    except OSError:
                        _refuse_link(self.path.joinpath(*folders[: index + 1]), current, part)
                        raise
                    stack.callback(_close_folder, inner)
                    current = inner
                yield current, leaf
        except UnsafePath:
            raise
        except OSError as error:
            raise _at(self.path / name, error) from error

    def _refuse_if_unsafe(self, name: str, leaf: str, folder: int | None, *, changes: bool = False) -> None:
        # Only for a clear message: what is opened is looked at again.
        try:
            found = os.stat(leaf, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return
        if not stat.S_ISDIR(found.st_mode):
            self._check_opened(name, found, os.O_WRONLY if changes else os.O_RDONLY)

    def _check_opened(self, name: str, found: os.stat_result, flags: int) -> None:
        path = self.path / name
        if not stat.S_ISREG(found.st_mode):
            raise unsafe(path, found.st_mode)
        if flags & (os.O_WRONLY | os.O_RDWR) and found.st_nlink > 1:
            problem = "has a second name (a hard link), so writing it would change that file too; copy it to a new one"
            raise UnsafePath(errno.EMLINK, problem, str(path))


def unsafe(path: Path, mode: int) -> UnsafePath:
    """The error for something that is not a regular file, nor a folder.

    Args:
        path: Where it is.
        mode: Its mode, as ``lstat`` returns it.
    """
    kind = next((kind for is_kind, kind in _KINDS if is_kind(mode)), "a special file")
    if stat.S_ISLNK(mode):
        with contextlib.suppress(OSError):
            kind = f"a link to {os.readlink(path)!r}"  # noqa: PTH115 - of the text, not a path
    return UnsafePath(errno.ELOOP, f"is {kind}", str(path))


def _refuse_link(path: Path, folder: int | None, part: str) -> None:
    """Raises :class:`UnsafePath` if a component of a path is not a folder but a link or special."""
    found = os.stat(part, dir_fd=folder, follow_symlinks=False)
    if not stat.S_ISDIR(found.st_mode) and not stat.S_ISREG(found.st_mode):
        raise unsafe(path, found.st_mode)


def _close_folder(descriptor: int) -> None:
    # Nothing was written through it, so nothing is lost.
    with contextlib.suppress(OSError):
        os.close(descriptor)


def _at(path: Path, error: OSError) -> OSError:
    """The error with the whole path; calls relative to a descriptor name the last component only."""
    if isinstance(error, UnsafePath):
        return error
    return OSError(error.errno, error.strerror, str(path))
