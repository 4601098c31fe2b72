"""Every exception that users meet, and the exit codes of commands; imports neither torch nor Hydra."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

from distrain.files.untrusted import printable

#: Exit code of a run that failed.
EXIT_FAILED = 1
#: Exit code of a configuration that can't run.
EXIT_REFUSED = 2
#: Exit code of a run that was asked to stop and saved everything, as sysexits' EX_TEMPFAIL: the same command goes on.
EXIT_STOPPED = 75


class ConfigError(ValueError):
    """What a user configured can't run; the message is one line that names the key, the value and the choices."""

    def __init__(self, key: str, value: object, problem: str, choices: Iterable[object] = ()) -> None:
        shown = list(choices)
        message = f"{key}={show_value(value)}: {problem}" if value is not ABSENT else f"{key}: {problem}"
        if shown:
            wrong = key.rpartition(".")[2] if value is ABSENT else str(value)
            close = difflib.get_close_matches(wrong, [str(choice) for choice in shown], n=1)
            message += f"; choices: {', '.join(map(show_value, shown))}"
            message += f" (did you mean {close[0]}?)" if close else ""
        super().__init__(printable(" ".join(message.split())))

    def __reduce__(self) -> tuple[Callable[[str], ConfigError], tuple[str]]:
        return refused, (str(self),)


class _Absent:
    def __repr__(self) -> str:
        return "???"


ABSENT = _Absent()
#: How a value that is not there is shown.
NO_VALUE = str(ABSENT)


def missing(key: str, problem: str, choices: Iterable[object] = ()) -> ConfigError:
    """A :class:`ConfigError` about a key that has no value to show."""
    return ConfigError(key, ABSENT, problem, choices)


def refused(line: str) -> ConfigError:
    """The :class:`ConfigError` that another process raised, from its line."""
    return ConfigError.__new__(ConfigError, line)


def show_value(value: object) -> str:
    """A value as a user would type it on the command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


class Terminated(Exception):
    """The process was asked to end by a signal."""


class PeerLost(RuntimeError):
    """Another rank is gone, and the run can't go on without it.

    Attributes:
        rank: Which.
        host: Where it was.
        reason: Why, as far as anybody knows.
    """

    def __init__(self, rank: int, host: str, reason: str) -> None:
        super().__init__(f"rank {rank} on {host} is gone: {reason}")
        self.rank, self.host, self.reason = rank, host, reason


class Stopped(Exception):
    """All ranks ended at the same step because they were asked to; everything is saved.

    Attributes:
        reason: Who asked: a signal, or the key of a limit.
    """

    def __init__(self, reason: str, step: int) -> None:
        super().__init__(f"stopped by {reason} at step {step}")
        self.reason = reason


class Failed(Exception):
    """The run failed and all was said; the process ends with a code that is not zero."""


class NonFinite(RuntimeError):
    """A loss, a gradient or a parameter is NaN or infinite, and the run is not to go on."""
