"""The callbacks of a run on one rank: how they are called, what their errors do, and their state in checkpoints.

An error of a callback fails the run as an error of the training does: the rank names the callback, and all other ranks
stop. Two kinds of calls can't fail it any more and are logged instead: :meth:`Callback.on_end`, and
:meth:`Callback.on_fit_end` in a run that fails already.

Checkpoints hold the state of rank 0's callbacks, as tensors and JSON. All ranks get it back, however many they are.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from distrain.checkpoint import safetensors_writer
from distrain.checkpoint.module_state import why_not_plain
from distrain.errors import ConfigError, Failed, Stopped, TakenOver, Terminated, described
from distrain.training.callbacks import Callback, RunEnd, RunView

log = logging.getLogger(__name__)

#: Where the state is in what a checkpoint saves.
_PLAIN, _TENSORS = "callbacks", "callback/"
#: What the run itself raises, also while a callback is called.
_OF_THE_RUN = (ConfigError, Failed, Stopped, TakenOver, Terminated)


class CallbackFailed(RuntimeError):
    """A callback raised an error; the message names it, the event and the error."""


class CallbackList:
    """Calls callbacks, one after the other.

    Args:
        callbacks: In the order in which they are called.
        named: Those that the configuration chooses, by their names there; they are called after the others.
    """

    def __init__(self, callbacks: Iterable[Callback], named: Mapping[str, Callback] | None = None) -> None:
        self._callbacks = [(type(callback).__name__, callback) for callback in callbacks]
        self._callbacks += (named or {}).items()

    def append(self, callback: Callback) -> None:
        """Adds a callback, which is called after the others."""
        self._callbacks.append((type(callback).__name__, callback))

    def __iter__(self) -> Iterator[Callback]:
        return (callback for _, callback in self._callbacks)

    def notify(self, event: str, run: RunView, *args: Any) -> None:
        """Calls a method of each callback.

        Raises:
            CallbackFailed: One raised an error.
        """
        for name, callback in self._callbacks:
            with _naming(name, event):
                getattr(callback, event)(run, *args)

    @contextlib.contextmanager
    def fitting(self, run: RunView) -> Iterator[None]:
        """Calls ``on_fit_start`` before a block, and ``on_fit_end`` after it, whatever happens in it."""
        self.notify("on_fit_start", run)
        try:
            yield
        except BaseException:
            self._notify_logging_errors("on_fit_end", run)
            raise
        self.notify("on_fit_end", run)

    @contextlib.contextmanager
    def ending(self, run: RunView) -> Iterator[RunEnd]:
        """Calls ``on_end`` after a block, which gives the run's summary to what this yields."""
        end = RunEnd("finished")
        try:
            yield end
        except BaseException as error:
            if isinstance(error, Stopped):
                end = RunEnd("stopped", error.reason)
            else:
                end = RunEnd("failed", " ".join(f"{type(error).__name__}: {error}".split()))
            self._notify_logging_errors("on_end", run, end)
            raise
        self._notify_logging_errors("on_end", run, end)

    def _notify_logging_errors(self, event: str, run: RunView, *args: Any) -> None:
        for name, callback in self._callbacks:
            try:
                getattr(callback, event)(run, *args)
            except Exception as error:  # a user's callback may raise anything
                log.warning("callback %s failed in %s %s", name, event, described(error))

    def add_state(self, state: dict[str, Any]) -> None:
        """Adds the callbacks' state to what rank 0 saves.

        Raises:
            CallbackFailed: A callback's state can't be saved.
        """
        plain: dict[str, dict[str, Any]] = {}
        tensors: dict[str, Tensor] = {}
        for name, callback in self._callbacks:
            with _naming(name, "state_dict"):
                own = callback.state_dict()
                for key, value in own.items():
                    problem = _why_not_saved(key, value)
                    if problem:
                        raise ValueError(f"its state has {key!r}, {problem}")
            tensors |= {f"{_TENSORS}{name}/{key}": value for key, value in own.items() if isinstance(value, Tensor)}
            if own:
                # A copy, since training goes on while it is written.
                plain[name] = copy.deepcopy({key: item for key, item in own.items() if not isinstance(item, Tensor)})
        if plain:
            state["scalars"] = {**state["scalars"], _PLAIN: plain}
        if tensors:
            state["local"] = {**state.get("local", {}), **tensors}

    def load_state(self, saved: Mapping[str, Mapping[str, Any]]) -> None:
        """Gives callbacks their saved state.

        Args:
            saved: By name; result of :func:`saved_state`.

        Raises:
            CallbackFailed: A callback can't load it.
        """
        for name, callback in self._callbacks:
            if own := saved.get(name):
                with _naming(name, "load_state_dict"):
                    callback.load_state_dict(own)


def saved_state(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The callbacks' state in a checkpoint, by the callback's name.

    Args:
        state: Result of :func:`distrain.checkpoint.reader.load`.
    """
    found = {name: dict(plain) for name, plain in state["scalars"].get(_PLAIN, {}).items()}
    local: Sequence[Mapping[str, Tensor]] = state.get("local") or []
    # The file may be large, and is read again here.
    for key, tensor in local[0].items() if found and local else ():
        if key.startswith(_TENSORS):
            name, _, inner = key.removeprefix(_TENSORS).partition("/")
            found.setdefault(name, {})[inner] = tensor
    return found


def _why_not_saved(key: object, value: object) -> str:
    if not isinstance(key, str):
        return "which is no text"
    if isinstance(value, Tensor):
        return safetensors_writer.why_unsupported(value)
    return why_not_plain(value)


@contextlib.contextmanager
def _naming(name: str, event: str) -> Iterator[None]:
    """Names the callback in errors of a block."""
    try:
        yield
    except _OF_THE_RUN:
        raise
    except Exception as error:  # a user's callback may raise anything
        raise CallbackFailed(f"callback {name} failed in {event} {described(error)}") from error
