"""Every exception that users meet, and the exit codes of commands; imports neither torch nor Hydra."""

from __future__ import annotations

import difflib
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

#: Exit code of a run that failed.
EXIT_FAILED = 1
#: Exit code of a command whose configuration was refused.
EXIT_REFUSED = 2
#: Exit code of a run that saved everything and stopped on request (sysexits' EX_TEMPFAIL); run it again to continue.
EXIT_STOPPED = 75
#: Exit code of a command that Ctrl-C ended at once; what shells show for a process that SIGINT has ended.
EXIT_INTERRUPTED = 130
#: Exit code of a command whose output nobody reads any more, as with ``| head``; what shells show for SIGPIPE.
EXIT_OUTPUT_CLOSED = 141

#: What asks a rank to stop, besides signals: the launcher that started it runs no more.
LAUNCHER_ENDED = "LAUNCHER_ENDED"


class ConfigError(ValueError):
    """The configuration is refused; the message is one line that names the key, the value and the choices.

    Args:
        key: The configuration key, or another name for what is wrong.
        value: Its value; :data:`ABSENT` if there is none to show.
        problem: Why it is refused.
        choices: What is permitted; the one closest to the value is suggested.
        meant: What the user may have meant instead; suggested if no choice is close.
    """

    def __init__(
        self, key: str, value: object, problem: str, choices: Iterable[object] = (), *, meant: Sequence[str] = ()
    ) -> None:
        shown = list(choices)
        message = f"{key}={show_value(value)}: {problem}" if value is not ABSENT else f"{key}: {problem}"
        if shown:
            message += f"; choices: {', '.join(map(show_value, shown))}"
            wrong = key.rpartition(".")[2] if value is ABSENT else str(value)
            by_lower_case = {str(choice).lower(): str(choice) for choice in shown}
            close = difflib.get_close_matches(wrong.lower(), by_lower_case, n=1, cutoff=0.7 if meant else 0.6)
            meant = [by_lower_case[name] for name in close] or meant
        message += f" (did you mean {' or '.join(meant)}?)" if meant else ""
        super().__init__(" ".join(message.split()))

    def __reduce__(self) -> tuple[Callable[[str], ConfigError], tuple[str]]:
        return config_error_from_line, (str(self),)


class _Absent:
    def __repr__(self) -> str:
        return "???"


ABSENT = _Absent()
#: How messages show a value that is absent.
NO_VALUE = str(ABSENT)


def config_error(key: str, problem: str, choices: Iterable[object] = (), *, meant: Sequence[str] = ()) -> ConfigError:
    """Returns a :class:`ConfigError` whose message shows a key without a value."""
    return ConfigError(key, ABSENT, problem, choices, meant=meant)


def config_error_from_line(line: str) -> ConfigError:
    """Returns a :class:`ConfigError` with this message, for example one that another process raised."""
    return ConfigError.__new__(ConfigError, line)


def show_value(value: object) -> str:
    """Returns a value as a user would type it on the command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def described(error: BaseException) -> str:
    """An error's type and message in brackets, and the line outside of torch and distrain that raised it."""
    # Where lines of code are that a user can't change; torch is only known here if somebody has imported it.
    not_users = (str(Path(__file__).parent), *getattr(sys.modules.get("torch"), "__path__", ()), "<")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(not_users)]
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return " ".join(f"({type(error).__name__}: {error}){where}".split())


def first_line(error: BaseException) -> str:
    """The first line of an error's message; empty if it has none."""
    return (str(error).strip().splitlines() or [""])[0]


class SampleError(RuntimeError):
    """A sample can't be read; the message is one line that names it and says why."""


class Terminated(Exception):
    """The process was asked to end at once.

    Args:
        request: Name of the signal, or :data:`LAUNCHER_ENDED`.

    Attributes:
        request: As given.
    """

    def __init__(self, request: str) -> None:
        super().__init__("its launcher has ended" if request == LAUNCHER_ENDED else f"ended by {request}")
        self.request = request


def termination_behind(error: BaseException) -> Terminated | None:
    """The request to end that led to an error: the error itself, or one that was being handled when it was raised.

    A library's clean-up that is interrupted by :class:`Terminated` may raise an error of its own instead.
    """
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        if isinstance(current, Terminated):
            return current
        seen.add(id(current))
        current = current.__cause__ or current.__context__
    return None


class TakenOver(RuntimeError):
    """The run's folder belongs to a later start of the run; this start writes nothing more into it, and ends."""


class PeerLost(RuntimeError):
    """Another rank has ended, and the run can't continue without it.

    Attributes:
        rank: The lost rank.
        host: Name of its host.
        reason: Why it ended, as far as is known.
        step: The last step of it that is known here; ``None`` if nothing is known of its steps.
    """

    def __init__(self, rank: int, host: str, reason: str, step: int | None = None) -> None:
        super().__init__(f"rank {rank} on {host} is gone: {reason}")
        self.rank, self.host, self.reason, self.step = rank, host, reason, step


class Stopped(Exception):
    """All ranks stopped after the same step on request; everything is saved.

    Attributes:
        reason: What asked for it: a signal's name, or the configuration key of a limit.
        step: Optimizer updates done.
    """

    def __init__(self, reason: str, step: int) -> None:
        super().__init__(f"stopped by {reason} at step {step}")
        self.reason = reason
        self.step = step


class Failed(Exception):
    """The run failed and the failure has been reported; the process ends with a non-zero exit code."""

    @property
    def exit_code(self) -> int:
        """The process's exit code."""
        request = None if self.__cause__ is None else termination_behind(self.__cause__)
        return EXIT_INTERRUPTED if request is not None and request.request == "SIGINT" else EXIT_FAILED


class OutOfMemory(RuntimeError):
    """A step needs more memory than there is; the message says how much of what, and what to type."""


class NonFinite(RuntimeError):
    """A loss, a gradient or a parameter is NaN or infinite, and the configuration does not let the run continue."""
