"""Plain data as files that people can read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


def as_json(content: Mapping[str, Any]) -> str:
    """Plain data as JSON that people can read too; a number that is not finite, which JSON lacks, is null."""
    return json.dumps(_finite(content), indent=2, allow_nan=False) + "\n"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes plain data; see :func:`as_json`."""
    path.write_text(as_json(content))


def replace_json(path: Path, content: Mapping[str, Any]) -> None:
    """As :func:`write_json`, but a reader finds the old file or the whole new one, whoever else writes it."""
    whole = path.with_name(f".{path.name}.{os.getpid()}")
    write_json(whole, content)
    whole.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    """Writes plain data as YAML, keys in their order."""
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True))
