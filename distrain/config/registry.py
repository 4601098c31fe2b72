"""The choices of each group: who registers them, and how one is found by its name.

Each part of distrain registers the schema of its own choices beside its code (:func:`register`), so that a new
strategy, model or data set is one Python file and one YAML file.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from distrain.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Choice:
    """One choice of a group: its schema, and what it builds."""

    group: str
    name: str
    schema: type[Any]
    target: Callable[..., Any]


_CHOICES: dict[str, dict[str, Choice]] = {}
#: Where each group's choices register themselves.
GROUPS = {
    "strategy": "distrain.strategies",
    "compression": "distrain.compression",
    "model": "distrain.models",
    "data": "distrain.data",
    "task": "distrain.tasks",
    "loss": "distrain.optim.losses",
    "optimizer": "distrain.optim.optimizers",
    "scheduler": "distrain.optim.schedulers",
    "logger": "distrain.reporting.loggers",
}


def register(group: str, name: str, schema: type[Any]) -> Callable[[T], T]:
    """Class or function decorator: ``name`` is a choice of ``group``, checked by the dataclass ``schema``.

    Raises:
        ValueError: The name is taken.
    """

    def decorate(target: T) -> T:
        names = _CHOICES.setdefault(group, {})
        if name in names and names[name].target is not target:
            raise ValueError(f"{group}={name} is registered twice: {names[name].target} and {target}")
        names[name] = Choice(group, name, schema, cast(Callable[..., Any], target))
        return target

    return decorate


def choice(group: str, name: Any, key: str | None = None) -> Choice:
    """One choice of a group; imports the file that is named after it, and the group's others only if that isn't there.

    A name with dots is the path of a class or function outside distrain, ``package.module.Name``, that is registered
    as a choice of the group: users add choices of their own so, without a line changed here.

    Args:
        group: The group.
        name: As the configuration has it.
        key: Where it stands, for the error; by default at the top.

    Raises:
        ConfigError: There is none of this name.
    """
    if isinstance(name, str) and "." in name:
        target = locate(f"{key or group}.name", name)
        for registered in _CHOICES.get(group, {}).values():
            if registered.target is target:
                return registered
        problem = f"is not a choice of {group}; decorate it with @register({group!r}, NAME, SCHEMA)"
        raise ConfigError(f"{key or group}.name", name, problem)
    _import_files(group, only=name)
    found = _CHOICES.get(group, {}).get(name) or choices(group).get(name)
    if found is None:
        raise ConfigError(f"{key or group}.name", name, "unknown choice", choices(group))
    return found


def choices(group: str) -> dict[str, Choice]:
    """All choices of a group by name; imports every file of the group's package, so that each has registered.

    That takes long (some files need much of torch), so :func:`choice` serves where the name is known.
    """
    _import_files(group)
    return _CHOICES[group]


def _import_files(group: str, only: Any = None) -> None:
    package = importlib.import_module(GROUPS[group])
    for module in pkgutil.iter_modules(getattr(package, "__path__", ())):
        if only is None or module.name == only:
            importlib.import_module(f"{package.__name__}.{module.name}")


def check_allowed(key: str, path: str, allowed: Iterable[str]) -> None:
    """Refuses a dotted path that lies below none of the allowed prefixes; see :func:`locate`.

    Raises:
        ConfigError: The path is not allowed.
    """
    prefixes = list(allowed)
    if not any(path == prefix or path.startswith(prefix.rstrip(".") + ".") for prefix in prefixes):
        problem = f"is not below {', '.join(prefixes)}, and a run folder may build nothing else; allow=[…] adds to that"
        raise ConfigError(key, path, problem)


def locate(key: str, path: str, *, allowed: Iterable[str] | None = None) -> Any:
    """The object at a dotted path.

    Args:
        key: The configuration key that holds the path, for the error.
        path: ``package.module.Name``.
        allowed: Prefixes a path may have, where the configuration comes from a stranger's run folder (nothing else is
            imported, since importing runs code); ``None`` trusts the path, as typed by the user.

    Raises:
        ConfigError: Not allowed, not a dotted path, not importable, or no such name.
    """
    if allowed is not None:
        check_allowed(key, path, allowed)
    module, dot, name = path.rpartition(".")
    if not dot or not all(part.isidentifier() for part in path.split(".")):
        raise ConfigError(key, path, "is not a dotted path like package.module.Name")
    # Where the user stands, so that `my_package.Net` finds what lies there; last, so that it hides nothing. Not before
    # it is asked for: Hydra and torch import optional packages wherever they find them.
    if path.partition(".")[0] != "distrain" and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever a user's module raises while it is imported
        raise ConfigError(key, path, f"can't be imported ({type(error).__name__}: {error})") from error
    try:
        return getattr(found, name)
    except AttributeError:
        raise ConfigError(key, path, f"module {module} has no {name}") from None
