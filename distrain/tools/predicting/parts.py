"""Parts of a prediction that are finished: a folder beside the result, by which ranks share the images.

===================== ==============================================================================================
``job.json``          what is predicted; parts of anything else are not used
``part_000012.jsonl`` the rows of a part, complete or absent
``claim_000012``      some rank works on this part; removed when the work begins again
===================== ==============================================================================================

Parts are the same for any number of ranks, and hold whole batches, so the result is the same too.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distrain.data.build_folder import publish
from distrain.errors import ConfigError
from distrain.files import locking
from distrain.files.untrusted import UnreadableFile, open_regular, read_json

_JOB, _LOCK = "job.json", ".lock"
_MAX_JOB_BYTES = 1 << 16
#: About how many parts there are, and the most batches in one: few files, and little work lost by a kill.
_PARTS, _MOST_BATCHES = 512, 64


class Parts:
    """The parts of one prediction; all ranks use the same folder.

    Args:
        target: The result file, whose name the folder's begins with.
        paths: All images.
        batch_size: Images per forward pass.
        settings: What else the rows depend on, as plain data by name.
    """

    def __init__(self, target: Path, paths: Sequence[str], batch_size: int, settings: Mapping[str, Any]) -> None:
        self.folder = target.with_name(f"{target.name}.parts")
        self._paths = paths
        batches = -(-len(paths) // batch_size)
        self._size = batch_size * min(max(1, -(-batches // _PARTS)), _MOST_BATCHES)
        self.count = -(-len(paths) // self._size)
        names = hashlib.sha256("\0".join(paths).encode("utf-8", "surrogateescape")).hexdigest()
        self._job = {"format": 1, "images": names, "batch_size": batch_size, **settings}
        self._lock: int | None = None
        self._started = False

    def start(self) -> str | None:
        """Makes the folder, or takes the parts in it that belong to this prediction; on rank 0, before all else.

        Returns:
            What a user should know of parts that were there already.

        Raises:
            ConfigError: The folder can't be used, or another process is using it.
        """
        # An image that has changed since then is predicted again.
        job = {**self._job, "files": _state_of(self._paths)}
        try:
            self.folder.mkdir(exist_ok=True)
            # Before a lock is put among what may be somebody's files, and again under the lock.
            self._earlier_job()
            self._take_lock()
            earlier = self._earlier_job()
            message = None
            if earlier is not None and earlier != job:
                changed = [name for name in job.keys() | earlier.keys() if job.get(name) != earlier.get(name)]
                message = (
                    f"{self.folder} held parts of another prediction ({', '.join(sorted(changed))}); it begins anew"
                )
                self._remove_files("part_*")
            elif earlier is not None:
                message = f"going on: {self.done():,} of {len(self._paths):,} images were predicted before"
            self._remove_files("claim_*")
            self._write(self.folder / _JOB, json.dumps(job))
            self._started = True
        except OSError as error:
            raise ConfigError("output", self.folder, f"can't be used ({error.strerror or error})") from error
        return message

    def check(self) -> None:
        """Checks that this rank was started for what rank 0 has prepared.

        Raises:
            RuntimeError: It was not, or does not see rank 0's folder.
        """
        try:
            job = read_json(self.folder / _JOB, _MAX_JOB_BYTES)
        except (OSError, UnreadableFile) as error:
            raise RuntimeError(f"{self.folder} is not seen here; all hosts must share the output's folder") from error
        changed = [name for name, value in self._job.items() if job.get(name) != value]
        if changed:
            raise RuntimeError(f"rank 0 predicts something else: {', '.join(changed)} differ")

    def unfinished(self) -> Iterator[tuple[int, Sequence[str]]]:
        """Claims one part after the other, and yields its number and images, until none is left."""
        for number in range(self.count):
            if not self._path(number).exists() and self._claim(number):
                yield number, self._paths[number * self._size : (number + 1) * self._size]

    def finish(self, number: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes the rows of a part."""
        self._write(self._path(number), "".join(json.dumps(row) + "\n" for row in rows))

    def done(self) -> int:
        """Number of images in finished parts."""
        finished = [int(path.stem[5:]) for path in self.folder.glob("part_*.jsonl")]
        return sum(min(self._size, len(self._paths) - number * self._size) for number in finished)

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows in the order of the images.

        Raises:
            RuntimeError: A part is not there.
        """
        for number in range(self.count):
            try:
                file = open_regular(self._path(number))
            except OSError as error:
                problem = "is missing; did all hosts share the output's folder?"
                raise RuntimeError(f"{self._path(number)} {problem}") from error
            with file:
                for line in file:
                    yield json.loads(line)

    def remove(self) -> None:
        """Removes the folder."""
        self._remove_files("part_*")
        self.close()

    def close(self) -> None:
        """Gives the folder free; finished parts stay, and without one nothing does."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if self._started and not self.done():
            shutil.rmtree(self.folder, ignore_errors=True)
        self._started = False

    # --- files -------------------------------------------------------------------------------------------------------

    def _path(self, number: int) -> Path:
        return self.folder / f"part_{number:06}.jsonl"

    def _take_lock(self) -> None:
        descriptor = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            locking.lock(descriptor, wait=False)
        except BlockingIOError as error:
            os.close(descriptor)
            raise ConfigError("output", self.folder, "is in use by another distrain predict") from error
        except OSError as error:
            # Without locks, two commands that write the same file at a time would only do the same work twice.
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                os.close(descriptor)
                raise
        self._lock = descriptor

    def _earlier_job(self) -> dict[str, Any] | None:
        """The job whose parts are there; empty if that is not known, and ``None`` if there are no parts.

        Raises:
            ConfigError: The folder holds files of somebody else.
        """
        names = [path.name for path in self.folder.iterdir()]
        foreign = [name for name in names if name != _JOB and not name.startswith((".", "part_", "claim_"))]
        if foreign:
            problem = f"is where parts of the prediction would be kept, and holds other files ({foreign[0]})"
            raise ConfigError("output", self.folder, problem)
        if not any(name.startswith("part_") for name in names):
            return None
        try:
            return read_json(self.folder / _JOB, _MAX_JOB_BYTES)
        except (FileNotFoundError, UnreadableFile):
            # A kill while the folder was removed leaves this.
            return {}

    def _remove_files(self, pattern: str) -> None:
        for path in self.folder.glob(pattern):
            path.unlink()

    def _claim(self, number: int) -> bool:
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self.folder / f"claim_{number:06}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            return True
        return False

    def _write(self, path: Path, text: str) -> None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        publish(temporary, path)


def _state_of(paths: Sequence[str]) -> str:
    """A hash that changes with any of the files, made of their sizes and times."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            state = os.stat(path)  # noqa: PTH116 - a Path for each of a million files takes longer
            digest.update(f"{state.st_size} {state.st_mtime_ns}\n".encode())
        except OSError:
            # Its row will say so.
            digest.update(b"none\n")
    return digest.hexdigest()
