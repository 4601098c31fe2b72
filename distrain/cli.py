"""Hydra's command line around a task, with mistakes told in one line.

A mistake is one line on the terminal and exit code 2, without a traceback unless ``HYDRA_FULL_ERROR=1``. A run that
failed has said so itself; its exit code is 1.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from distrain.config import ConfigError, missing, one_line
from distrain.runtime import Failed

#: Exit code of a configuration that can't run.
REFUSED = 2
#: Exit code of a run that failed.
FAILED = 1


def main(task: Callable[[DictConfig], object], conf: Path, config_name: str) -> None:
    """Composes the configuration from ``sys.argv`` and runs the task; ends the process with the right exit code.

    Args:
        task: Takes what Hydra composed.
        conf: The folder of YAML files.
        config_name: The primary file, without ``.yaml``.
    """
    # Where the user stands, so that `model._target_=my_package.Net` finds what lies there; last, so it hides nothing.
    sys.path.append(str(Path.cwd()))
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") not in (None, "", "0")
    # Hydra prints errors its own way and exits with 1 unless told to let them through.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    decorated: Any = hydra.main(version_base="1.3", config_path=str(conf.resolve()), config_name=config_name)(task)
    try:
        decorated()
    except (ConfigError, HydraException, OmegaConfBaseException, MissingConfigException) as error:
        if wants_traceback:
            raise
        refuse(error if isinstance(error, ConfigError) else explain(error, conf, config_name, sys.argv[1:]))
    except Failed:
        # Threads of the process group may still wait for a peer that is gone; there is nothing left to tidy.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(FAILED)


def refuse(error: ConfigError) -> None:
    """Prints the line, once a host, and ends the process."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"distrain: {error}", file=sys.stderr, flush=True)
    else:
        # The launcher ends all ranks as soon as one is gone, so the one that speaks goes first.
        time.sleep(2)
    sys.exit(REFUSED)


def explain(error: BaseException, conf: Path, config_name: str, overrides: Sequence[str]) -> ConfigError:
    """Turns Hydra's and OmegaConf's errors into one line with key, value and choices."""
    if isinstance(error, MissingConfigException):
        group, _, name = str(error.missing_cfg_file or "").rpartition("/")
        options = [str(option) for option in error.options or ()] or _files(conf / group)
        return ConfigError(group or config_name, name, "no such choice", options)
    if isinstance(error, OverrideParseException):
        return ConfigError("argument", error.override, "is not of the form key=value")
    cause = error.__cause__ if isinstance(error, ConfigCompositionException) and error.__cause__ else error
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        key = str(cause.full_key or cause.key)
        parent, _, name = key.rpartition(".")
        return missing(key, "no such key", keys_of(parent, conf, config_name, overrides))
    if isinstance(cause, OmegaConfBaseException):
        return one_line(cause)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return missing("configuration", lines[0] if lines else type(error).__name__)


def keys_of(parent: str, conf: Path, config_name: str, overrides: Sequence[str]) -> list[str]:
    """The keys below ``parent``, composed with the groups that the command line picked and without its values."""
    parser = OverridesParser.create()
    groups = {path.relative_to(conf).as_posix() for path in conf.rglob("*") if path.is_dir()}
    picked = []
    for text in overrides:
        if "=" in text and text.split("=", 1)[0].lstrip("+") in groups:
            override = parser.parse_overrides([text])[0]
            picked.append(str(override.input_line))
    try:
        node = (
            OmegaConf.select(compose(conf, config_name, picked), parent)
            if parent
            else compose(conf, config_name, picked)
        )
    except (HydraException, OmegaConfBaseException):
        return []
    return [str(key) for key in node] if isinstance(node, DictConfig) else []


def compose(conf: Path, config_name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """What Hydra composes from the overrides, outside a command line."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(conf.resolve()), version_base="1.3"):
        return hydra.compose(config_name, list(overrides))


def _files(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))
