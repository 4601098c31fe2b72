"""Arrays in files of NumPy: an .npz file, or a folder of .npy files. Nothing in them is unpickled."""

from __future__ import annotations

import zipfile
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from distrain.errors import ConfigError

_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


@dataclass(frozen=True)
class ArrayHeader:
    """Shape and type of an array that isn't read yet."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class ArrayFiles(ABC):
    """Arrays by name.

    Attributes:
        root: The file or folder.
        headers: Shape and type of each array, in the order of their names.
    """

    def __init__(self, root: Path, headers: dict[str, ArrayHeader]) -> None:
        self.root, self.headers = root, headers

    @abstractmethod
    def read(self, name: str) -> npt.NDArray[Any]:
        """An array: in memory from an .npz file, as a read-only memory map from a folder.

        Raises:
            ConfigError: The file is damaged.
        """

    @abstractmethod
    def fingerprint(self, name: str) -> str:
        """Tells two contents of an array apart, as far as that is possible without reading all of it."""


class ZipOfArrays(ArrayFiles):
    """An .npz file, as ``numpy.savez`` writes it."""

    def __init__(self, root: Path) -> None:
        try:
            self._zip = zipfile.ZipFile(root)
            members = [name for name in self._zip.namelist() if name.endswith(".npy")]
            headers = {name.removesuffix(".npy"): self._header(name) for name in sorted(members)}
        except ConfigError:
            raise
        except Exception as error:  # a damaged file makes zipfile and NumPy raise almost anything
            raise ConfigError("data.root", root, f"is no .npz file, or a damaged one ({error})") from error
        super().__init__(root, headers)

    def _header(self, member: str) -> ArrayHeader:
        with self._zip.open(member) as file:
            return _read_header(self._zip.filename or "", member, file)

    def read(self, name: str) -> npt.NDArray[Any]:  # noqa: D102 - as in the base class
        try:
            with self._zip.open(f"{name}.npy") as file:
                array: npt.NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
                return array
        except Exception as error:  # as above
            raise ConfigError("data.root", self.root, f"{name} can't be read ({error})") from error

    def fingerprint(self, name: str) -> str:  # noqa: D102 - as in the base class
        return str(self._zip.getinfo(f"{name}.npy").CRC)


class FolderOfArrays(ArrayFiles):
    """A folder of .npy files, each named for its array."""

    def __init__(self, root: Path) -> None:
        headers = {}
        for path in sorted(root.glob("*.npy")):
            try:
                with path.open("rb") as file:
                    headers[path.stem] = _read_header(str(root), path.name, file)
            except ConfigError:
                raise
            except Exception as error:  # as above
                raise ConfigError("data.root", root, f"{path.name} is damaged ({error})") from error
        super().__init__(root, headers)

    def read(self, name: str) -> npt.NDArray[Any]:  # noqa: D102 - as in the base class
        try:
            return np.lib.format.open_memmap(self.root / f"{name}.npy", mode="r")
        except Exception as error:  # as above
            raise ConfigError("data.root", self.root, f"{name}.npy is damaged ({error})") from error

    def fingerprint(self, name: str) -> str:  # noqa: D102 - as in the base class
        # The first and last rows: reading all of a file that is larger than memory would take as long as an epoch.
        array = self.read(name)
        ends = [np.ascontiguousarray(part).tobytes() for part in (array[:1], array[-1:])]
        return f"{zlib.crc32(b''.join(ends))} {array.nbytes}"


def open_arrays(root: Path) -> ArrayFiles:
    """Opens an .npz file or a folder of .npy files.

    Raises:
        ConfigError: It is neither, or has no arrays.
    """
    if root.is_dir():
        arrays: ArrayFiles = FolderOfArrays(root)
        packed = sorted(path.name for path in root.glob("*.npz"))
        hint = f"; for a file in it type data.root={root / packed[0]}" if packed else ""
    elif root.suffix.lower() == ".npy":
        raise ConfigError("data.root", root, f"is one array; name its folder, {root.parent}, which holds one for each")
    elif not root.exists():
        raise ConfigError("data.root", root, "is neither an .npz file nor a folder of .npy files: it doesn't exist")
    elif not root.is_file():
        raise ConfigError("data.root", root, "is neither a file nor a folder")
    else:
        arrays, hint = ZipOfArrays(root), ""
    if not arrays.headers:
        raise ConfigError("data.root", root, f"has no arrays (.npy){hint}")
    return arrays


def _read_header(root: str, name: str, file: IO[bytes]) -> ArrayHeader:
    version = np.lib.format.read_magic(file)
    read = _HEADERS.get(version)
    if read is None:
        raise ValueError(f"{name} is of version {version} of NumPy's format")
    shape, _, dtype = read(file)
    if dtype.hasobject:
        problem = f"{name} holds Python objects, whose pickle could run code; save numbers: array.astype(…)"
        raise ConfigError("data.root", root, problem)
    return ArrayHeader(shape, dtype)
