"""Checks composed configurations, turns them into dataclasses, and back into plain containers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import operator
import os
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException, ValidationError

from distrain.config.key_search import schema_docs, similar_keys
from distrain.config.registry import GROUPS, choice, choices, selectable
from distrain.config.schema import (
    CallbackConfig,
    CheckpointConfig,
    Config,
    FreezeConfig,
    InitConfig,
    LoraConfig,
    MetricConfig,
    PruneConfig,
    RuntimeConfig,
    TrainerConfig,
)
from distrain.errors import ABSENT, ConfigError, config_error, config_error_from_line, show_value

T = TypeVar("T")


def load_config(composed: DictConfig | Mapping[str, Any]) -> Config:
    """Checks a run's configuration against the schemas.

    Args:
        composed: A configuration composed by Hydra, or the content of a run's ``config.yaml``.

    Returns:
        The configuration as dataclasses; each group is an instance of the schema of its choice.

    Raises:
        ConfigError: A key or choice is unknown, or a value has the wrong type or is outside its limits.
    """
    node = composed if isinstance(composed, DictConfig) else OmegaConf.create(dict(composed))
    if not isinstance(node, DictConfig):
        raise config_error("configuration", "is not a mapping of keys to values")
    fields = {f.name: f for f in dataclasses.fields(Config)}
    for key in node:
        if key not in fields:
            raise config_error(str(key), "no such key", fields, meant=similar_keys(str(key), schema_docs(Config)))
    values: dict[str, Any] = {}
    try:
        # Interpolations (${…}) are resolved in the whole configuration, since they may refer to another group.
        node = cast(DictConfig, OmegaConf.create(OmegaConf.to_container(node, resolve=True)))
        # Groups last: their modules import torch, which takes long; errors in other keys are found without that.
        for key, spec in sorted(fields.items(), key=lambda item: item[0] in GROUPS):
            if key in GROUPS:
                values[key] = _load_choice(key, key, node.get(key, _GROUP_DEFAULTS.get(key)))
            elif key in _SECTIONS:
                # The config.yaml of older releases has no section `init`.
                values[key] = _to_dataclass(key, _SECTIONS[key], node.get(key, _SECTION_DEFAULTS.get(key)))
                _check_limits(key, values[key])
            elif key in ("metrics", "callbacks"):
                values[key] = _named_entries(key, cast(dict[str, Any], OmegaConf.to_container(node)).get(key))
            elif key in node:
                values[key] = node[key]
            elif spec.default is None:
                values[key] = None
            elif spec.default_factory is dataclasses.MISSING:
                raise config_error(key, f"needs a value: {spec.metadata['doc']}")
        top = _to_dataclass("", _Top, OmegaConf.create({k: v for k, v in values.items() if k in _TOP_KEYS}))
    except OmegaConfBaseException as error:
        raise config_error_from_omegaconf(error) from error
    config = Config(**{**values, **{k: getattr(top, k) for k in _TOP_KEYS}})
    _check_limits("", config)
    return config


def load_settings(schema: type[T], composed: DictConfig) -> T:
    """Checks the configuration of a command other than ``train`` against its schema.

    Raises:
        ConfigError: A key is unknown, or a value has the wrong type or is outside its limits.
    """
    settings = cast(T, _to_dataclass("", schema, composed))
    _check_limits("", settings)
    return settings


def load_group(group: str, content: Mapping[str, Any]) -> Any:
    """Checks one choice of a group against its schema.

    Args:
        group: The group, such as ``strategy``.
        content: The choice's ``name`` and keys, as in its YAML file.

    Raises:
        ConfigError: As :func:`load_config`.
    """
    loaded = _load_choice(group, group, OmegaConf.create(dict(content)))
    _check_limits(group, loaded)
    return loaded


@dataclass
class _Top:
    """The keys of :class:`Config` that are in no section or group."""

    seed: int = 0
    resume: str = dataclasses.field(default="auto", metadata={"path": True})
    run_dir: str | None = dataclasses.field(default=None, metadata={"path": True})
    freeze: list[FreezeConfig] = dataclasses.field(default_factory=list)
    plan: str | None = dataclasses.field(default=None, metadata={"path": True})
    metrics: list[MetricConfig] = dataclasses.field(default_factory=list)
    callbacks: list[CallbackConfig] = dataclasses.field(default_factory=list)
    experiment: str | None = None


def _named_entries(key: str, value: Any) -> list[dict[str, Any]]:
    """The entries of ``metrics`` or ``callbacks`` as mappings, each with a name: by default that of its class."""
    entries = [] if value is None else value if isinstance(value, list) else [value]
    named: list[dict[str, Any]] = []
    for entry in entries:
        if isinstance(entry, str):
            entry = {"name": entry}
        if not isinstance(entry, dict):
            raise ConfigError(key, entry, "each is a name, or a mapping with name or _target_, and kwargs")
        path = entry.get("_target_")
        default = str(path).rpartition(".")[2] if path is not None else None
        name = entry.get("name", default)
        if not isinstance(name, str):
            raise ConfigError(key, entry, "needs a name, or a _target_")
        if any(name == other["name"] for other in named):
            raise ConfigError(key, name, "is named twice; another name=… tells two of one class apart")
        named.append({**entry, "name": name})
    return named


#: Choices of groups that are missing in the config.yaml of older releases.
_GROUP_DEFAULTS = {"task": OmegaConf.create({"name": "classification"})}
_TOP_KEYS = [f.name for f in dataclasses.fields(_Top)]


_SECTION_DEFAULTS = {"init": OmegaConf.create(), "lora": OmegaConf.create(), "prune": OmegaConf.create()}
_SECTIONS = {
    "init": InitConfig,
    "lora": LoraConfig,
    "prune": PruneConfig,
    "trainer": TrainerConfig,
    "checkpoint": CheckpointConfig,
    "runtime": RuntimeConfig,
}


#: What false and true mean where a key has the choices off and auto: in YAML, ``off`` is the truth value false.
_SWITCHES = {"False": "off", "True": "auto"}


def _load_choice(group: str, key: str, node: Any) -> Any:
    """The configuration of a choice of ``group``, found at ``key``, as an instance of the choice's schema."""
    if not isinstance(node, DictConfig):
        raise ConfigError(key, node, f"needs one of the choices of conf/{group}", selectable(choices(group)))
    registered = choice(group, node.get("name"), key)
    if not registered.target.__module__.startswith("distrain."):
        node = _without_unused_keys(registered.schema, node)
    return _to_dataclass(key, registered.schema, node)


def _without_unused_keys(schema: type[Any], node: DictConfig) -> DictConfig:
    """The node without keys at null that the schema lacks.

    A file of the user's takes from one of distrain's the keys that all choices of the group share; that one may have
    keys of its own, and gets more with later releases.
    """
    known = {spec.name for spec in dataclasses.fields(schema)}
    names = [str(name) for name in node]
    kept = [name for name in names if name in known or OmegaConf.is_missing(node, name) or node.get(name) is not None]
    return OmegaConf.masked_copy(node, kept)


def _to_dataclass(key: str, schema: type[Any], node: Any) -> Any:
    """The mapping at ``key`` as an instance of a schema; values are converted to the types of its fields."""
    _check_keys(key, schema, node)
    _check_lists_of_mappings(key, schema, node)
    try:
        instance: Any = OmegaConf.to_object(OmegaConf.merge(_as_omegaconf(schema), node))
    except ValidationError as error:
        raise _wrong_type(error, key, schema, node) from error
    except OmegaConfBaseException as error:
        raise config_error_from_omegaconf(error, prefix=key, schema=schema) from error
    for spec in dataclasses.fields(schema):
        value = getattr(instance, spec.name)
        if spec.metadata.get("path"):
            setattr(instance, spec.name, _expand_home(_join(key, spec.name), value))
        if "off" in spec.metadata.get("choices", ()) and value in _SWITCHES:
            setattr(instance, spec.name, _SWITCHES[value])
        group = spec.metadata.get("choices_of")
        if group is not None:
            values = getattr(instance, spec.name)
            for name in values:
                values[name] = _load_nested_choice(
                    group, _join(_join(key, spec.name), str(name)), node[spec.name][name]
                )
    return instance


#: The OmegaConf form of each schema that was loaded.
_STRUCTURED: dict[Any, Any] = {}


def _as_omegaconf(schema: Any) -> Any:
    """The schema with its defaults, only to be merged from: what is merged is a copy."""
    if schema not in _STRUCTURED:
        _STRUCTURED[schema] = OmegaConf.structured(schema)
    return _STRUCTURED[schema]


#: The types of the keys of each schema that was loaded.
_TYPES: dict[Any, dict[str, Any]] = {}


def _types(schema: Any) -> dict[str, Any]:
    """The type of each key."""
    if schema not in _TYPES:
        _TYPES[schema] = typing.get_type_hints(schema)
    return _TYPES[schema]


def _expand_home(key: str, value: Any) -> Any:
    """A path, or a list of paths, with the user's home folder for a ``~`` at the beginning."""
    if isinstance(value, list):
        return [_expand_home(key, element) for element in value]
    if not isinstance(value, str) or not value.startswith("~"):
        return value
    expanded = os.path.expanduser(value)  # noqa: PTH111 - keeps a leading ./ and a trailing slash
    if expanded == value:
        raise ConfigError(key, value, "has no such home folder; a folder whose name begins with ~ is written ./~…")
    return expanded


def _load_nested_choice(group: str, key: str, node: Any) -> Any:
    """A choice of ``group`` that is configured inside another choice, at ``key``."""
    try:
        return _load_choice(group, key, node)
    except ConfigError as error:
        line = str(error)
        # A schema that checks its own keys names them as below its group; the message must name them as below ``key``.
        if line.startswith(f"{group}.") and not line.startswith(key):
            raise config_error_from_line(key + line.removeprefix(group)) from error
        raise


def _check_keys(key: str, schema: type[Any], node: Any) -> None:
    if not isinstance(node, DictConfig):
        raise ConfigError(key, node, "must be a mapping of keys to values")
    types = _types(schema)
    for name in map(str, node):
        if name not in types:
            raise config_error(_join(key, name), "no such key", types)
        if dataclasses.is_dataclass(types[name]):
            _check_keys(_join(key, name), types[name], node[name])


def _check_lists_of_mappings(key: str, schema: type[Any], node: DictConfig) -> None:
    """Checks each element of a list by itself, since OmegaConf's errors would not say which element is wrong."""
    values = cast(dict[str, Any], OmegaConf.to_container(node))
    for name, hint in _types(schema).items():
        element = next(iter(typing.get_args(hint)), None)
        items = values.get(name) if dataclasses.is_dataclass(element) else None
        for position, item in enumerate(items if isinstance(items, list) else []):
            if isinstance(item, dict):
                _to_dataclass(f"{_join(key, name)}[{position}]", cast(type[Any], element), OmegaConf.create(item))


def _wrong_type(error: ValidationError, prefix: str, schema: type[Any], node: DictConfig) -> ConfigError:
    """The error for a value of the wrong type: names the expected type in words."""
    # If an element of a list is wrong, the message names and shows the whole list.
    key = str(error.full_key or "").partition("[")[0]
    expected: Any = schema
    for name in key.split("."):
        expected = _types(expected).get(name) if dataclasses.is_dataclass(expected) else None
    if expected is None:
        return config_error_from_omegaconf(error, prefix=prefix, schema=schema)
    return ConfigError(_join(prefix, key), OmegaConf.select(node, key), f"must be {describe_type(expected)}")


def describe_type(hint: Any) -> str:
    """A type hint in words, for example ``a whole number, or null``."""
    arguments = typing.get_args(hint)
    if type(None) in arguments:
        return f"{describe_type(arguments[0])}, or null"
    if typing.get_origin(hint) is list:
        return f"a list, each element {describe_type(arguments[0])}"
    if arguments and typing.get_origin(hint) is not dict:
        return " or ".join(map(describe_type, arguments))
    words: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(hint, "a mapping of keys to values")


#: For each limit of :func:`~distrain.config.setting.setting`, its comparison and its words in messages.
LIMITS: dict[str, tuple[Callable[[float, float], bool], str]] = {
    "above": (operator.gt, "greater than"),
    "at_least": (operator.ge, "at least"),
    "below": (operator.lt, "less than"),
    "at_most": (operator.le, "at most"),
}


def _check_limits(prefix: str, value: Any) -> None:
    """Checks the limits and choices of all fields of a dataclass found at ``prefix``, at any depth."""
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
            words = limits.get("words", ())
            if words and isinstance(element, str) and element not in words:
                raise ConfigError(key, element, "is neither a whole number nor one of the words", words)
            if isinstance(element, bool) or not isinstance(element, int | float):
                continue
            for name, (holds, phrase) in LIMITS.items():
                limit = limits.get(name)
                if limit is not None and not holds(element, limit):
                    raise ConfigError(key, item, f"must be {phrase} {limit}")


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def config_error_from_omegaconf(error: BaseException, prefix: str = "", schema: type[Any] | None = None) -> ConfigError:
    """Turns an error of OmegaConf, whose message has several lines, into one line that names the key.

    Args:
        error: An exception of OmegaConf or Hydra.
        prefix: Key of the configuration that the error's key is relative to.
        schema: Dataclass at ``prefix``, if known; the message names its keys.
    """
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
    """The configuration as plain dictionaries, lists and scalars, as in ``config.yaml``."""
    return dataclasses.asdict(config)


def fingerprint(container: Mapping[str, Any]) -> str:
    """A hash of a resolved configuration (see :func:`to_container`), which must be equal on all ranks."""
    return hashlib.sha256(json.dumps(container, sort_keys=True).encode()).hexdigest()


def changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[str, str]]:
    """Compares two configurations.

    Args:
        old: A configuration as plain data.
        new: Another one.
        prefix: Key at which both are found; empty for whole configurations.

    Returns:
        Both values as text for each dotted key whose values differ; ``NO_VALUE`` for a missing one.
    """
    changed: dict[str, tuple[str, str]] = {}
    for key in sorted({*old, *new}):
        a, b = old.get(key, ABSENT), new.get(key, ABSENT)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            changed |= changes(a, b, _join(prefix, key))
        elif a != b:
            changed[_join(prefix, key)] = (show_value(a), show_value(b))
    return changed


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Dotted keys whose values differ, each with both values: ``key: one ≠ other``."""
    return [f"{key}: {a} ≠ {b}" for key, (a, b) in changes(one, other).items()]
