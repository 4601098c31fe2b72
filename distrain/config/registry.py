"""Registry of choices: the strategies, models, data sets and so on that a configuration can name.

Each choice registers itself and its schema beside its own code by :func:`register`, so that a new strategy, model or
data set needs one Python file and one YAML file and no other change.
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

#: The model or data set that is an object of a Python program, as in ``distrain.fit``. A command can't choose it, so it
#: is in no list of choices.
PYTHON_OBJECT = "python_object"


@dataclass(frozen=True)
class Choice:
    """A choice of a group.

    Attributes:
        group: The group, such as ``strategy``.
        name: Name of the choice, unique in its group.
        schema: Dataclass of its configuration.
        target: The class or function that is configured by it.
    """

    group: str
    name: str
    schema: type[Any]
    target: Callable[..., Any]


_CHOICES: dict[str, dict[str, Choice]] = {}
#: The package or module whose files register the choices of each group.
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
    """Class or function decorator: registers a choice ``name`` of ``group``, configured by the dataclass ``schema``.

    Raises:
        ValueError: The group has another choice of this name.
    """

    def decorate(target: T) -> T:
        names = _CHOICES.setdefault(group, {})
        if name in names and names[name].target is not target:
            raise ValueError(f"{group}={name} is registered twice: {names[name].target} and {target}")
        names[name] = Choice(group, name, schema, cast(Callable[..., Any], target))
        return target

    return decorate


def choice(group: str, name: Any, key: str | None = None) -> Choice:
    """Finds a choice of a group by its name.

    To save time, it imports only the module that has the name of the choice; if there is none, all modules of the
    group. A name with dots is the path of a registered class or function outside distrain, ``package.module.Name``; so
    users can add choices without changing distrain.

    Args:
        group: The group.
        name: The choice's name in the configuration.
        key: Key of the choice in the configuration, for the message; by default the group.

    Raises:
        ConfigError: The group has no such choice.
    """
    if isinstance(name, str) and "." in name:
        target = locate(f"{key or group}.name", name)
        for registered in _CHOICES.get(group, {}).values():
            if registered.target is target:
                return registered
        problem = f"is not a choice of {group}; decorate it with @register({group!r}, NAME, SCHEMA)"
        raise ConfigError(f"{key or group}.name", name, problem)
    _import_files(group, only=name)
    registered_choice = _CHOICES.get(group, {}).get(name) or choices(group).get(name)
    if registered_choice is None:
        raise ConfigError(f"{key or group}.name", name, "unknown choice", selectable(choices(group)))
    return registered_choice


def choices(group: str) -> dict[str, Choice]:
    """All choices of a group by name.

    It imports all modules of the group, which takes long; use :func:`choice` if the name is known.
    """
    _import_files(group)
    return dict(sorted(_CHOICES[group].items()))


def selectable(names: Iterable[str]) -> list[str]:
    """Of the names of choices, those that a command can choose."""
    return [name for name in names if name != PYTHON_OBJECT]


def _import_files(group: str, only: Any = None) -> None:
    package = importlib.import_module(GROUPS[group])
    for module in pkgutil.iter_modules(getattr(package, "__path__", ())):
        if only is None or module.name == only:
            importlib.import_module(f"{package.__name__}.{module.name}")


def check_allowed(key: str, path: str, allowed: Iterable[str]) -> None:
    """Refuses a dotted path that is below none of the allowed prefixes; see :func:`locate`.

    Raises:
        ConfigError: The path is not allowed.
    """
    prefixes = list(allowed)
    if not any(path == prefix or path.startswith(prefix.rstrip(".") + ".") for prefix in prefixes):
        problem = f"is not below {', '.join(prefixes)}, and a run folder may build nothing else; allow=[…] adds to that"
        raise ConfigError(key, path, problem)


def check_target(key: str, path: str, allowed: Iterable[str]) -> None:
    """Refuses a dotted path that a run folder may not name, or that leads to what another module defines.

    Raises:
        ConfigError: As :func:`locate`.
    """
    allowed = list(allowed)
    target = locate(key, path, allowed=allowed)
    # An allowed module may have imported the object from a module that is not allowed.
    check_allowed(key, f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}", allowed)


def locate(key: str, path: str, *, allowed: Iterable[str] | None = None) -> Any:
    """Imports the object at a dotted path.

    Args:
        key: The configuration key of the path, for the message.
        path: ``package.module.Name``.
        allowed: Allowed prefixes of the path, for a configuration from an untrusted run folder. Other paths are not
            imported, since an import runs code. ``None`` allows any path, for a configuration that the user wrote.

    Raises:
        ConfigError: The path is not allowed, not dotted or not importable, or the module has no such name.
    """
    if allowed is not None:
        check_allowed(key, path, allowed)
    module, dot, name = path.rpartition(".")
    if not dot or not all(part.isidentifier() for part in path.split(".")):
        raise ConfigError(key, path, "is not a dotted path like package.module.Name")
    # The current folder becomes importable, so that users can name their own packages. It is appended, so that it hides
    # no other package, and only when it is needed, since Hydra and torch import optional packages from any folder.
    if path.partition(".")[0] != "distrain" and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        imported = importlib.import_module(module)
    except Exception as error:  # a user's module may raise anything
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and (module == missing or module.startswith(f"{missing}.")):
            problem = f"can't be imported: there is no module {missing} in the current folder, {Path.cwd()}"
            raise ConfigError(key, path, f"{problem}, nor in a folder that PYTHONPATH names") from error
        raise ConfigError(key, path, f"can't be imported ({type(error).__name__}: {error})") from error
    try:
        return getattr(imported, name)
    except AttributeError:
        problem = f"module {module} has no {name}"
        file, root = getattr(imported, "__file__", None), path.partition(".")[0]
        here = next((own for own in (Path(root), Path(f"{root}.py")) if own.exists()), None)
        if file is not None and here is not None and Path.cwd() not in Path(file).parents:
            problem += f"; {file} hides {here} of the current folder: rename that, or put the folder on PYTHONPATH"
        raise ConfigError(key, path, problem) from None
