"""What the schema says of a single key: what it affects, and its default."""

from __future__ import annotations

import dataclasses
from typing import Any

from distrain.config.schema import Config
from distrain.config.setting import Effect

#: Keys of mappings whose keys are no choices of distrain: arguments of what ``_target_`` names, or layers of a model.
ARGUMENTS = (
    *(f"{group}.kwargs" for group in ("model", "data", "loss", "optimizer", "scheduler", "logger")),
    "model.arguments",
    "strategy.plan",
    *(f"data.{part}" for part in ("train", "val", "test", "held_out")),
)


def affected_by(config: Config, key: str) -> frozenset[Effect]:
    """What a key affects: the effects of its field and of the fields above it.

    Args:
        config: A run's configuration; its choices determine the keys.
        key: A dotted key, such as ``optimizer.lr``.
    """
    effects: frozenset[Effect] = frozenset()
    node: Any = config
    for name in key.split("."):
        fields = {spec.name: spec for spec in dataclasses.fields(node)} if dataclasses.is_dataclass(node) else {}
        if name not in fields:
            break
        effects |= fields[name].metadata.get("affects", frozenset())
        node = getattr(node, name)
    return effects


def default_of(config: Config, key: str) -> Any:
    """The value that a key has where a configuration doesn't name it; ``dataclasses.MISSING`` if it must.

    Args:
        config: A run's configuration; its choices determine the keys.
        key: A dotted key, such as ``data.fold``.
    """
    section, _, name = key.rpartition(".")
    node: Any = config
    for part in section.split("."):
        node = getattr(node, part, None)
    fields = {spec.name: spec for spec in dataclasses.fields(node)} if dataclasses.is_dataclass(node) else {}
    return fields[name].default if name in fields else dataclasses.MISSING
