"""From keywords and dotted keys to a checked configuration, by the same files and checks as on the command line."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distrain.cli.hydra_entry import compose, to_config_error
from distrain.config.folder import CONF
from distrain.config.load import config_error_from_omegaconf, load_config
from distrain.config.registry import GROUPS
from distrain.config.schema import Config
from distrain.errors import ConfigError, config_error

#: Keywords that stand for a dotted key.
KEYWORDS = {
    "epochs": "trainer.epochs",
    "max_steps": "trainer.max_steps",
    "batch_size": "data.batch_size",
    "lr": "optimizer.lr",
    "device": "runtime.device",
}
#: Groups whose choice is a keyword; the model and the data are arguments of their own.
_CHOICES = (GROUPS.keys() - {"model", "data"}) | {"experiment"}
#: A choice of a group, for messages.
_EXAMPLES = {"optimizer": "adam", "strategy": "ddp", "loss": "cross_entropy", "scheduler": "cosine"}
#: What other libraries call a keyword of ours.
_ELSEWHERE = {"devices": "nproc", "num_processes": "nproc", "accelerator": "device", "max_epochs": "epochs"}


def merge(*mappings: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys and choices from several mappings, with keywords written out.

    Raises:
        ConfigError: A key is given twice.
    """
    merged: dict[str, Any] = {}
    for mapping in mappings:
        for name, value in mapping.items():
            key = KEYWORDS.get(name, name)
            if key in merged:
                raise ConfigError(key, value, "is given twice" + (f", once as {name}" if key != name else ""))
            merged[key] = value
    return merged


def build_config(
    settings: Mapping[str, Any],
    *,
    model: str,
    data: str,
    fixed: Mapping[str, Any],
    config_dir: str | os.PathLike[str] | None = None,
) -> Config:
    """Composes and checks a configuration.

    Args:
        settings: Choices by group and values by dotted key; result of :func:`merge`.
        model: Choice of the group ``model``.
        data: Choice of the group ``data``.
        fixed: Values by dotted key that the settings may not change.
        config_dir: A folder of the user's with further choices, as ``--config-dir`` on the command line.

    Raises:
        ConfigError: A key, a choice or a value is wrong.
    """
    for key in settings:
        if key in _ELSEWHERE:
            raise config_error(key, f"no such keyword; it is called {_ELSEWHERE[key]} here")
        if key in ("model", "data") or key in fixed:
            raise config_error(key, "can't be set here: it says which objects fit() was given")
    choices = {key: value for key, value in settings.items() if key in _CHOICES and not isinstance(value, Mapping)}
    overrides = [f"model={model}", f"data={data}"]
    for group, value in choices.items():
        if group == "logger" and isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
            value = f"[{','.join(value)}]"
        if value is not None and not isinstance(value, str):
            kind = value.__name__ if isinstance(value, type) else type(value).__name__
            example = f", such as {group}='{_EXAMPLES[group]}'" if group in _EXAMPLES else ""
            problem = f"must be the name of a choice, not {kind}{example}"
            raise config_error(group, f"{problem}; its arguments go into keys={{'{group}.…': …}}")
        overrides.append(f"{group}={'null' if value is None else value}")
    if config_dir is not None:
        folder = Path(config_dir).resolve()
        if not folder.is_dir():
            raise ConfigError("config_dir", config_dir, "is not a folder")
        overrides.append(f'hydra.searchpath=["file://{folder}"]')
    try:
        composed = compose(CONF, "config", overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise to_config_error(error, CONF, "config", overrides) from error
    OmegaConf.set_struct(composed, False)
    values = {key: value for key, value in settings.items() if key not in choices}
    for key, value in {**values, **fixed}.items():
        _set(composed, key, value)
    return load_config(composed)


def _set(composed: DictConfig, key: str, value: Any) -> None:
    try:
        OmegaConf.update(composed, key, _plain(value), force_add=True)
    except OmegaConfBaseException as error:
        raise config_error_from_omegaconf(error) from error


def _plain(value: Any) -> Any:
    """The value as YAML could hold it, where that is clear."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic) or (isinstance(value, torch.Tensor) and value.dim() == 0):
        return value.item()
    if isinstance(value, torch.device):
        return str(value)
    if isinstance(value, np.ndarray | tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    return value
