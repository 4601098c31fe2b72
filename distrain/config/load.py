"""From what Hydra composed to checked dataclasses, and back to plain containers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import operator
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException, ValidationError

from distrain.config.registry import GROUPS, choice, choices
from distrain.config.schema import CheckpointConfig, Config, RuntimeConfig, TrainerConfig
from distrain.errors import ABSENT, ConfigError, config_error, config_error_from_line, show_value

T = TypeVar("T")


def load_config(composed: DictConfig | Mapping[str, Any]) -> Config:
    """Checks a composed configuration against the schemas.

    Args:
        composed: What Hydra composed, or the content of a run's ``config.yaml``.

    Returns:
        The same as dataclasses; groups are instances of the schema their ``name`` chose.

    Raises:
        ConfigError: An unknown key or choice, a wrong type, a value outside its limits.
    """
    node = composed if isinstance(composed, DictConfig) else OmegaConf.create(dict(composed))
    if not isinstance(node, DictConfig):
        raise config_error("configuration", "is not a mapping of keys to values")
    fields = {f.name: f for f in dataclasses.fields(Config)}
    for key in node:
        if key not in fields:
            raise config_error(str(key), "no such key", fields)
    values: dict[str, Any] = {}
    try:
        # While the whole is there to refer to: a group by itself can't follow ${…} to another.
        node = cast(DictConfig, OmegaConf.create(OmegaConf.to_container(node, resolve=True)))
        # Groups last: their choices' files import torch, which a mistake elsewhere need not wait for.
        for key, spec in sorted(fields.items(), key=lambda item: item[0] in GROUPS):
            if key in GROUPS:
                values[key] = _choice(key, key, node.get(key, _GROUP_DEFAULTS.get(key)))
            elif key in _SECTIONS:
                values[key] = _typed(key, _SECTIONS[key], node.get(key))
                _check_limits(key, values[key])
            elif key in node:
                values[key] = node[key]
            elif spec.default is None:
                values[key] = None
            else:
                raise config_error(key, f"needs a value: {spec.metadata['doc']}")
        top = _typed("", _Top, OmegaConf.create({k: v for k, v in values.items() if k in _TOP_KEYS}))
    except OmegaConfBaseException as error:
        raise config_error_from_omegaconf(error) from error
    config = Config(**{**values, **{k: getattr(top, k) for k in _TOP_KEYS}})
    _check_limits("", config)
    return config


def load_settings(schema: type[T], composed: DictConfig) -> T:
    """A composed configuration of another command, checked against its schema.

    Raises:
        ConfigError: An unknown key, a wrong type, a value outside its limits.
    """
    settings = cast(T, _typed("", schema, composed))
    _check_limits("", settings)
    return settings


@dataclass
class _Top:
    seed: int = 0
    resume: str = "auto"
    run_dir: str | None = None
    experiment: str | None = None


#: Choices of groups that came with a later release than some runs whose config.yaml is read.
_GROUP_DEFAULTS = {"task": OmegaConf.create({"name": "classification"})}
_TOP_KEYS = [f.name for f in dataclasses.fields(_Top)]


_SECTIONS = {"trainer": TrainerConfig, "checkpoint": CheckpointConfig, "runtime": RuntimeConfig}


def _choice(group: str, key: str, node: Any) -> Any:
    """One choice of a group as the dataclass that its name picks; ``key`` is where it stands."""
    if not isinstance(node, DictConfig):
        raise ConfigError(key, node, f"needs one of the choices of conf/{group}", choices(group))
    return _typed(key, choice(group, node.get("name"), key).schema, node)


def _typed(key: str, schema: type[Any], node: Any) -> Any:
    _check_keys(key, schema, node)
    try:
        made: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), node))
    except ValidationError as error:
        raise _wrong_type(error, key, schema, node) from error
    except OmegaConfBaseException as error:
        raise config_error_from_omegaconf(error, prefix=key, schema=schema) from error
    for spec in dataclasses.fields(schema):
        group = spec.metadata.get("choices_of")
        if group is not None:
            held = getattr(made, spec.name)
            for name in held:
                held[name] = _inner_choice(group, _join(_join(key, spec.name), str(name)), node[spec.name][name])
    return made


def _inner_choice(group: str, key: str, node: Any) -> Any:
    """A choice that is a value inside another one."""
    try:
        return _choice(group, key, node)
    except ConfigError as error:
        line = str(error)
        # A schema that compares its own keys names them by its group, which is not where they stand here.
        if line.startswith(f"{group}.") and not line.startswith(key):
            raise config_error_from_line(key + line.removeprefix(group)) from error
        raise


def _check_keys(key: str, schema: type[Any], node: Any) -> None:
    if not isinstance(node, DictConfig):
        raise ConfigError(key, node, "must be a mapping of keys to values")
    wanted = typing.get_type_hints(schema)
    for name in map(str, node):
        if name not in wanted:
            raise config_error(_join(key, name), "no such key", wanted)
        if dataclasses.is_dataclass(wanted[name]):
            _check_keys(_join(key, name), wanted[name], node[name])


def _wrong_type(error: ValidationError, prefix: str, schema: type[Any], node: DictConfig) -> ConfigError:
    path = str(error.full_key or "")
    wanted: Any = schema
    for name in path.partition("[")[0].split("."):
        wanted = typing.get_type_hints(wanted).get(name) if dataclasses.is_dataclass(wanted) else None
    if wanted is None:
        return config_error_from_omegaconf(error, prefix=prefix, schema=schema)
    # The whole list, where it is one of its elements that is wrong.
    key = path.partition("[")[0]
    return ConfigError(_join(prefix, key), OmegaConf.select(node, key), f"must be {_in_words(wanted)}")


def _in_words(wanted: Any) -> str:
    arguments = typing.get_args(wanted)
    if type(None) in arguments:
        return f"{_in_words(arguments[0])}, or null"
    if typing.get_origin(wanted) is list:
        return f"a list, each element {_in_words(arguments[0])}"
    if arguments and typing.get_origin(wanted) is not dict:
        return " or ".join(map(_in_words, arguments))
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(wanted, "a mapping of keys to values")


_LIMITS: dict[str, tuple[Callable[[float, float], bool], str]] = {
    "above": (operator.gt, "greater than"),
    "at_least": (operator.ge, "at least"),
    "below": (operator.lt, "less than"),
    "at_most": (operator.le, "at most"),
}


def _check_limits(prefix: str, value: Any) -> None:
    for spec in dataclasses.fields(value):
        key, item = _join(prefix, spec.name), getattr(value, spec.name)
        if dataclasses.is_dataclass(item):
            _check_limits(key, item)
            continue
        if spec.metadata.get("choices_of"):
            for name, inner in item.items():
                _check_limits(_join(key, name), inner)
            continue
        limits = spec.metadata
        allowed = limits.get("choices", ())
        for position, element in enumerate(item if isinstance(item, list) else [item]):
            if dataclasses.is_dataclass(element):
                _check_limits(f"{key}[{position}]", element)
                continue
            if isinstance(element, float) and not math.isfinite(element):
                raise ConfigError(key, element, "must be a finite number")
            if allowed and element not in allowed:
                raise ConfigError(key, element, "unknown choice", allowed)
            if isinstance(element, bool) or not isinstance(element, int | float):
                continue
            for name, (holds, words) in _LIMITS.items():
                limit = limits.get(name)
                if limit is not None and not holds(element, limit):
                    raise ConfigError(key, item, f"must be {words} {limit}")


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def config_error_from_omegaconf(error: BaseException, prefix: str = "", schema: type[Any] | None = None) -> ConfigError:
    """Turns OmegaConf's several lines into one that names the key, the value and what was expected."""
    full_key = str(getattr(error, "full_key", "") or getattr(error, "key", "") or "")
    key = _join(prefix, full_key) if full_key and not full_key.startswith(prefix + ".") else full_key or prefix
    text = str(getattr(error, "msg", "") or error).splitlines()[0]
    if isinstance(error, MissingMandatoryValue):
        meanings = {_join(prefix, f.name): f.metadata.get("doc") for f in dataclasses.fields(schema)} if schema else {}
        return config_error(key, f"needs a value: {meanings[key]}" if meanings.get(key) else "needs a value")
    if isinstance(error, ConfigKeyError):
        names = [f.name for f in dataclasses.fields(schema)] if schema else ()
        return config_error(key, "no such key", names)
    return config_error(key or "configuration", text)


def to_container(config: Config) -> dict[str, Any]:
    """The configuration as plain dictionaries, lists and scalars, as ``config.yaml`` holds it."""
    return dataclasses.asdict(config)


def fingerprint(container: Mapping[str, Any]) -> str:
    """A hash of a resolved configuration (see :func:`to_container`); equal on all ranks or the run is refused."""
    return hashlib.sha256(json.dumps(container, sort_keys=True).encode()).hexdigest()


def changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[str, str]]:
    """Keys whose values differ, dotted, each with both values as text; ``NO_VALUE`` where there is none."""
    found: dict[str, tuple[str, str]] = {}
    for key in sorted({*old, *new}):
        a, b = old.get(key, ABSENT), new.get(key, ABSENT)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= changes(a, b, _join(prefix, key))
        elif a != b:
            found[_join(prefix, key)] = (show_value(a), show_value(b))
    return found


def difference(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Keys whose values differ, each as ``key: mine ≠ theirs``."""
    return [f"{key}: {a} ≠ {b}" for key, (a, b) in changes(mine, theirs).items()]
