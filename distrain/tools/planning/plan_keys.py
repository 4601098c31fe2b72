"""From the keys of a configuration in a plan to what a training is configured with."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import yaml

from distrain.config.folder import CONF
from distrain.config.load import load_group
from distrain.config.schema import Config
from distrain.errors import ConfigError, first_line

#: Strategies that a plan looks at.
STRATEGIES = ("single", "ddp", "fsdp", "tensor_parallel", "pipeline", "mesh", "local_sgd", "parameter_server")
#: Compressors that a plan times; the others send about as much as one of them.
COMPRESSORS = ("bf16", "qsgd", "powersgd", "topk", "signsgd")
#: What a configuration that names no choice of a group has, and what it may name.
_GROUPS = {"strategy": ("single", STRATEGIES), "compression": ("none", ("none", *COMPRESSORS))}


def with_keys(config: Config, keys: Mapping[str, str]) -> Config:
    """A training with the strategy and compressor of a configuration in a plan.

    Args:
        config: The training.
        keys: As on the command line; keys that are not named have the values of the YAML files below ``conf``.

    Raises:
        ConfigError: A key or value is wrong.
    """
    return dataclasses.replace(config, **{group: choice_of(group, keys) for group in _GROUPS})


def choice_of(group: str, keys: Mapping[str, str]) -> Any:
    """What the keys of a configuration choose of a group, as its dataclass.

    Args:
        group: ``strategy`` or ``compression``.
        keys: As for :func:`with_keys`.

    Raises:
        ConfigError: As :func:`with_keys`.
    """
    default, names = _GROUPS[group]
    name = keys.get(group, default)
    if name not in names:
        raise ConfigError(group, name, "is not planned", names)
    content = dict(_defaults(group, name))
    for key, value in keys.items():
        if key.startswith(f"{group}."):
            section, _, of_section = key.removeprefix(f"{group}.").partition(".")
            try:
                loaded = yaml.safe_load(value)
            except (yaml.YAMLError, RecursionError) as error:
                raise ConfigError(key, value, f"is not YAML: {first_line(error)}") from error
            content[section] = {**content[section], of_section: loaded} if of_section else loaded
    return load_group(group, content)


def period_of(keys: Mapping[str, str]) -> int:
    """Steps after which the same repeats, such as a merge of ``local_sgd``.

    Args:
        keys: Of a configuration.
    """
    return int(keys.get("strategy.sync_every", 1))


@functools.cache
def _defaults(group: str, name: str) -> Mapping[str, Any]:
    content: dict[str, Any] = yaml.safe_load((CONF / group / f"{name}.yaml").read_text())
    # Hydra's list of other files is no key.
    content.pop("defaults", None)
    return content


def planned_otherwise(config: Config) -> list[str]:
    """What depends on the memory of a run, which a plan predicts and doesn't limit."""
    remarks = []
    if config.model.checkpoint_activations == "auto":
        remarks.append("model.checkpoint_activations=auto is planned as none: where memory is short, steps take longer")
    if config.trainer.micro_batch_size == "auto":
        remarks.append("trainer.micro_batch_size=auto is planned as one pass: where memory is short, there are more")
    return remarks
