"""The keys of a training behind ``--``, for commands that have keys of their own before it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from distrain.cli import hydra_entry
from distrain.cli.arguments import refuse_python_objects
from distrain.config.folder import CONF
from distrain.config.load import load_config
from distrain.config.schema import Config


def compose_training(keys: Sequence[str], conf: Path = CONF) -> Config:
    """The checked configuration of a training.

    Args:
        keys: Settings, as on the command line of ``train``.
        conf: Folder of the YAML files.

    Raises:
        ConfigError: A key is wrong.
    """
    try:
        refuse_python_objects(keys)
        composed = hydra_entry.compose(conf, "config", keys)
    except (HydraException, OmegaConfBaseException) as error:
        raise hydra_entry.to_config_error(error, conf, "config", keys) from error
    return load_config(composed)
