"""Finds runs below a folder, and opens their files, which may come from a stranger: bounded, never through a link."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from distrain.errors import ConfigError
from distrain.files.contained_folder import ContainedFolder
from distrain.files.untrusted import UnreadableFile, parse_json, parse_yaml, read_open

#: Most runs that one comparison shows.
MOST_RUNS = 200
#: Runs lie at most as deep below a folder that is searched: ``outputs/DATE/TIME_sweep/JOB``.
_MAX_DEPTH = 4
_MAX_FOLDERS = 20_000
_MAX_CONFIG_BYTES = 1 << 17
_MAX_JSON_BYTES = 1 << 24
_MAX_TABLE_BYTES = 1 << 24
#: A folder that holds one of these files is a run's, or a job's of a sweep.
_OF_A_RUN = frozenset({"summary.json", "metrics.jsonl", "failure.json", "status.json", "overrides.txt"})
#: One of these, besides ``config.yaml``, tells a run from any other folder of a program that uses Hydra.
_BESIDE_CONFIG = frozenset({"data.json", "logs", "checkpoints"})
#: The folder itself, as the path of a run in it.
_ITSELF = "."


@dataclass(frozen=True)
class RunFiles:
    """The files of one run.

    Attributes:
        folder: The folder that no link may lead out of.
        inner: The run's path in it, with ``/``; a dot for the folder itself.
        outcome: What the table of the run's sweep says of it: status and reason.
    """

    folder: ContainedFolder
    inner: str = _ITSELF
    outcome: tuple[str, str] | None = None

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.folder.path / self.inner

    def open(self, name: str) -> IO[bytes] | None:
        """Opens a file for reading; ``None`` if there is no such file.

        Raises:
            UnreadableFile: It is a link, a pipe or another thing that no run writes, or can't be opened.
        """
        try:
            return self.folder.open_file(f"{self.inner}/{name}", "rb")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UnreadableFile(f"{name}: {error.strerror or error}") from error

    def version(self, name: str) -> tuple[int, int] | None:
        """Time of the last change and size of a file, to see whether it has changed; ``None`` without one.

        Raises:
            UnreadableFile: As for :func:`open`.
        """
        file = self.open(name)
        if file is None:
            return None
        with file:
            found = os.fstat(file.fileno())
        return found.st_mtime_ns, found.st_size

    def json(self, name: str, max_bytes: int = _MAX_JSON_BYTES) -> dict[str, Any] | None:
        """Reads a JSON object; ``None`` if there is no such file.

        Args:
            name: The file.
            max_bytes: Largest size that is read.

        Raises:
            UnreadableFile: It can't be read, or is no JSON object.
        """
        text = self._text(name, max_bytes)
        return None if text is None else parse_json(name, text)

    def yaml(self, name: str) -> dict[Any, Any] | None:
        """Reads a YAML mapping; ``None`` if there is no such file.

        Raises:
            UnreadableFile: It can't be read, or is no YAML mapping.
        """
        text = self._text(name, _MAX_CONFIG_BYTES)
        return None if text is None else parse_yaml(name, text)

    def rows_of_table(self, name: str) -> list[dict[str, str]]:
        """Reads a CSV file with column names in its first line; no rows if there is no such file.

        Raises:
            UnreadableFile: It can't be read, or is no CSV file.
        """
        text = self._text(name, _MAX_TABLE_BYTES)
        try:
            rows = list(csv.DictReader(io.StringIO(text or ""), restkey="", restval=""))
        except csv.Error as error:
            raise UnreadableFile(f"{name} is not a table ({error})") from error
        return rows

    def _text(self, name: str, max_bytes: int) -> str | None:
        file = self.open(name)
        return None if file is None else read_open(file, name, max_bytes)


@dataclass
class FoundRuns:
    """Runs in the order in which they were named or found.

    Attributes:
        runs: Their files.
        notices: What could not be looked at, in one line each.
    """

    runs: list[RunFiles] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def find_runs(paths: Sequence[str], key: str = "DIR") -> FoundRuns:
    """Finds runs.

    Args:
        paths: Run folders, or folders that hold runs at some depth, such as a sweep's.
        key: What the command calls them, for error messages.

    Raises:
        ConfigError: A path is no folder, or holds no run, or there are too many.
    """
    found = FoundRuns()
    seen: set[Path] = set()
    for path in paths:
        if not Path(path).is_dir():
            problem = "is not a folder" if Path(path).exists() else "there is no such folder"
            raise ConfigError(key, path, problem)
        before = len(found.notices)
        here = list(_search(ContainedFolder(Path(path)), found.notices))
        if not here:
            why = f" ({'; '.join(found.notices[before:])})" if len(found.notices) > before else ""
            problem = f"is not a run's folder and holds none{why}; name a folder that distrain train or sweep wrote"
            raise ConfigError(key, path, problem)
        for run in here:
            # The same run may be named twice, or once by itself and once by its sweep.
            if run.path.resolve() not in seen:
                seen.add(run.path.resolve())
                found.runs.append(run)
        if len(found.runs) > MOST_RUNS:
            raise ConfigError(key, path, f"these are more than {MOST_RUNS} runs; name fewer, or a folder deeper inside")
    return found


def _search(folder: ContainedFolder, notices: list[str]) -> Iterator[RunFiles]:
    looked_at = links = 0
    unreadable: list[str] = []
    #: Folders to look at: path, depth, and what a sweep's table says of it.
    waiting: list[tuple[str, int, tuple[str, str] | None]] = [(_ITSELF, 0, None)]
    while waiting:
        inner, depth, outcome = waiting.pop()
        looked_at += 1
        if looked_at > _MAX_FOLDERS:
            raise ConfigError("DIR", folder.path, f"holds more than {_MAX_FOLDERS} folders; name one deeper inside")
        try:
            names = folder.names(inner)
            if _is_run(names):
                yield RunFiles(folder, inner, outcome)
            elif depth < _MAX_DEPTH:
                outcomes = _outcomes(RunFiles(folder, inner), notices) if "results.csv" in names else {}
                inside = [(str(PurePosixPath(inner, name)), name) for name in names if not name.startswith(".")]
                folders = [(path, depth + 1, outcomes.get(name)) for path, name in inside if folder.is_folder(path)]
                waiting += reversed(folders)
                links += sum(folder.is_link(path) for path, _ in inside)
        except OSError as error:
            unreadable.append(
                f"{error.filename or folder.path / inner} can't be looked into: {error.strerror or error}"
            )
    if unreadable:
        more = f", nor can {len(unreadable) - 1} more" if len(unreadable) > 1 else ""
        notices.append(f"{unreadable[0]}{more}")
    if links:
        which = "1 link is" if links == 1 else f"{links} links are"
        notices.append(f"{folder.path}: {which} not followed; name a run behind a link itself")


def _is_run(names: list[str]) -> bool:
    present = set(names)
    return bool(present & _OF_A_RUN) or ("config.yaml" in present and bool(present & _BESIDE_CONFIG))


def _outcomes(sweep: RunFiles, notices: list[str]) -> dict[str, tuple[str, str]]:
    """What a sweep's table says of each job: status and reason."""
    try:
        rows = sweep.rows_of_table("results.csv")
    except UnreadableFile as error:
        notices.append(f"{sweep.path}: {error}")
        return {}
    return {row["job"]: (row["status"], row.get("reason", "")) for row in rows if row.get("job") and row.get("status")}
