"""The callbacks that ``callbacks`` chooses: those that distrain knows by name, and those of the user."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType

from distrain.config import user_code
from distrain.config.registry import locate
from distrain.config.schema import CallbackConfig, Config
from distrain.errors import ConfigError
from distrain.training.callbacks import Callback

#: Where each callback is that has a name of its own; imported when it is used.
KNOWN = {
    "filters": "distrain.training.ready_callbacks.filters.Filters",
    "gradient_histograms": "distrain.training.ready_callbacks.gradient_histograms.GradientHistograms",
    "notify": "distrain.training.ready_callbacks.notify.Notify",
}
_KEY = "callbacks"
_NAME = re.compile(r"[A-Za-z0-9_.-]+")

_offered: ContextVar[Mapping[str, Callback]] = ContextVar("offered_callbacks", default=MappingProxyType({}))


@contextlib.contextmanager
def offered_callbacks(callbacks: Mapping[str, Callback]) -> Iterator[None]:
    """Inside this block the names of these objects, which a Python program has made, stand for them."""
    token = _offered.set(callbacks)
    try:
        yield
    finally:
        _offered.reset(token)


def check(config: Config) -> None:
    """Refuses callbacks that can't be built.

    Raises:
        ConfigError: One is unknown or no callback, or doesn't take its arguments.
    """
    for entry in config.callbacks:
        if not _NAME.fullmatch(entry.name):
            raise ConfigError(_KEY, entry.name, "can't be a callback's name: choose another one by name=…")
        if entry.name in _offered.get():
            continue
        target = _class_of(entry)
        if entry._target_ is None:
            # Ready-made ones also check the values, and do nothing else.
            _build(entry, target)


def build(config: Config, *, is_main: bool) -> dict[str, Callback]:
    """The chosen callbacks that this rank has, in their order, by name.

    Raises:
        ConfigError: As :func:`check`, or one fails to be built.
    """
    built = {}
    for entry in config.callbacks:
        callback = _offered.get().get(entry.name)
        if callback is None:
            target = _class_of(entry)
            if target.only_on_main and not is_main:
                continue
            callback = _build(entry, target)
        elif callback.only_on_main and not is_main:
            continue
        built[entry.name] = callback
    return built


def _class_of(entry: CallbackConfig) -> type[Callback]:
    path = entry._target_ or KNOWN.get(entry.name)
    if path is None:
        raise ConfigError(_KEY, entry.name, "no such callback; a class of yours is named by _target_", KNOWN)
    target = locate(_KEY, path)
    if not isinstance(target, type) or not issubclass(target, Callback):
        raise ConfigError(_KEY, path, "is not a class of distrain.Callback")
    user_code.check_arguments(_KEY, entry.kwargs, path, target, entry.kwargs)
    return target


def _build(entry: CallbackConfig, target: type[Callback]) -> Callback:
    return user_code.build(_KEY, entry._target_ or entry.name, lambda: target(**entry.kwargs))
