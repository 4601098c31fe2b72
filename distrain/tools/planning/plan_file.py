"""The file ``plan.json``: its name, how it is read, and what a plan holds for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distrain.config.load import changes, to_container
from distrain.config.schema import Config
from distrain.errors import NO_VALUE
from distrain.files.untrusted import read_json

FILE = "plan.json"
#: A larger file is no plan.
_MAX_BYTES = 1 << 26
#: What a step's time depends on: whole sections of a training's configuration, and keys of others.
_SECTIONS = ("model", "lora", "freeze")
_KEYS = {
    "data": ("name", "batch_size", "augment", "limit", "memory_limit_mb", "prefetch"),
    "task": ("name",),
    "loss": ("name",),
    "prune": ("amount",),
    "optimizer": ("name", "sam_rho"),
    "trainer": (
        "micro_batch_size",
        "precision",
        "lowest_precision",
        "compile",
        "memory_format",
        "deterministic",
        "grad_clip_norm",
    ),
    "runtime": ("device", "backend", "shared_memory", "threads"),
}
#: Most changes that a message shows.
_MOST_SHOWN = 3


def read(path: Path) -> dict[str, Any]:
    """The content of a plan.

    Args:
        path: The file, or the folder that holds it.

    Raises:
        FileNotFoundError: There is none.
        UnreadableFile: It is no JSON.
    """
    return read_json(path / FILE if path.is_dir() else path, _MAX_BYTES)


def planned_part(config: Config) -> dict[str, Any]:
    """The part of a configuration that a plan holds for; strategy and compressor are what it chooses.

    Args:
        config: The training's configuration, as its user wrote it: before formats are chosen by a trial.
    """
    whole = to_container(config)
    parts = {section: {key: whole[section][key] for key in keys} for section, keys in _KEYS.items()}
    return {**{section: whole[section] for section in _SECTIONS}, **parts}


def what_changed(planned: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In words, what differs between two such parts; empty if nothing does."""
    found = [
        f"{key} was {old} and is {new}"
        for key, (old, new) in changes(planned, now).items()
        # Else a release has added or removed the key.
        if NO_VALUE not in (old, new) or key.partition(".")[0] not in _KEYS
    ]
    more = f", and {len(found) - _MOST_SHOWN} more" if len(found) > _MOST_SHOWN else ""
    return ", ".join(found[:_MOST_SHOWN]) + more
