"""Hydra's command line around a task, with mistakes told in one line.

A mistake is one line on the terminal and exit code 2, without a traceback unless ``HYDRA_FULL_ERROR=1``. A run that
failed has said so itself; its exit code is 1. One that was asked to stop, and saved everything, has 75.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import functools
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Sweep
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from distrain.config.load import one_line
from distrain.errors import EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED, ConfigError, Failed, Stopped, config_error

#: How long the other ranks of a host leave the word to its first.
_PATIENCE_SECONDS = 2

#: HYDRA_FULL_ERROR as the user set it, for processes started from here; :func:`main` changes the variable itself.
user_hydra_full_error: str | None = None


class Ended(Exception):
    """All was said; the process ends with this code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"ended with exit code {code}")
        self.code = code


def main(task: Callable[[DictConfig], object], conf: Path, config_name: str) -> None:
    """Composes the configuration from ``sys.argv`` and runs the task; ends the process with the right exit code.

    Args:
        task: Takes what Hydra composed.
        conf: The folder of YAML files.
        config_name: The primary file, without ``.yaml``.
    """
    global user_hydra_full_error
    user_hydra_full_error = os.environ.get("HYDRA_FULL_ERROR")
    wants_traceback = user_hydra_full_error not in (None, "", "0")
    # Hydra prints errors its own way and exits with 1 unless told to let them through.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    composing = True
    # The interpreter goes through all objects before it takes its modules apart, a third of a second after torch.
    atexit.register(gc.freeze)

    # Hydra names the job after the module that the task comes from.
    @functools.wraps(task)
    def guarded(composed: DictConfig) -> None:
        nonlocal composing
        composing = False
        # Ended here, because Hydra adds lines of its own to what comes out of a task.
        try:
            task(composed)
        except ConfigError as error:
            if wants_traceback:
                raise
            refuse(error)
        except Exception as error:
            if not isinstance(error, Failed | Stopped):
                raise
            if isinstance(error, Stopped):
                # The launcher may end this rank because another one has just left with the same code.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                _leave(EXIT_STOPPED)
            # Threads of the process group may still wait for a peer that is gone; there is nothing left to tidy.
            _leave(EXIT_FAILED)

    decorated: Any = hydra.main(version_base="1.3", config_path=str(conf.resolve()), config_name=config_name)(guarded)
    try:
        _check_options(sys.argv[1:])
        decorated()
    except Ended as ended:
        sys.exit(ended.code)
    except Exception as error:  # Hydra and YAML have many kinds for what is wrong with the user's words
        if wants_traceback or not composing:
            raise
        refuse(error if isinstance(error, ConfigError) else explain(error, conf, config_name, sys.argv[1:]))
    runtime = sys.modules.get("distrain.runtime.runtime")
    if runtime is not None and runtime.joined_group:
        # All is written and said. Destructors that run while torch's communication threads end bring down about 3 % of
        # runs of several ranks with "terminate called without an active exception", so they are not run.
        atexit.register(_leave, 0)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Puts off garbage collection; imports make objects that stay, and torch's take a tenth longer with it."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def take_command(arguments: list[str]) -> list[str]:
    """Takes ``-- COMMAND...``, which Hydra must not read, off the end of a command line, and returns the command."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    command = arguments[split + 1 :]
    del arguments[split:]
    return command


def restore_environment() -> None:
    """Undoes what :func:`main` set for Hydra, before other programs inherit it."""
    os.environ.pop("HYDRA_FULL_ERROR", None)
    if user_hydra_full_error is not None:
        os.environ["HYDRA_FULL_ERROR"] = user_hydra_full_error


def _leave(code: int) -> NoReturn:
    """Ends the process at once, without destructors."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def refuse(error: ConfigError) -> NoReturn:
    """Prints the line, once a host, and ends the process."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        # The launcher ends all ranks as soon as one is gone, so rank 0 of the host goes first and speaks for all. A
        # rank that outlives the wait found a mistake that rank 0 did not.
        time.sleep(_PATIENCE_SECONDS)
    print(f"distrain: {error}", file=sys.stderr, flush=True)
    sys.exit(EXIT_REFUSED)


def _check_options(arguments: Sequence[str]) -> None:
    parser = get_args_parser()
    parser.exit_on_error = False
    try:
        options, unknown = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise config_error("command line", str(error)) from error
    if unknown and not unknown[0].startswith("-"):
        raise config_error(
            f"argument '{unknown[0]}'", "options such as --multirun stand before all settings or after them"
        )
    if unknown:
        raise config_error(
            f"argument '{unknown[0]}'", "no such option; settings are key=value, without dashes; see --help"
        )
    if options.experimental_rerun is not None:
        raise ConfigError(
            "--experimental-rerun", options.experimental_rerun, "reads a pickle, which could run any code"
        )


def explain(error: BaseException, conf: Path, config_name: str, arguments: Sequence[str]) -> ConfigError:
    """Turns Hydra's and OmegaConf's errors into one line with key, value and choices."""
    if isinstance(error, MissingConfigException):
        group, _, name = str(error.missing_cfg_file or "").rpartition("/")
        options = [str(option) for option in error.options or ()] or _files(conf / group)
        return ConfigError(group or config_name, name, "no such choice", options)
    if isinstance(error, OverrideParseException):
        return config_error(
            f"argument '{error.override}'", "is not of the form key=value, or a bracket or quote is open"
        )
    overrides = _overrides(arguments)
    for override in overrides:
        key, value = override.key_or_group, override.value()
        if not key:
            return config_error(f"argument '{override.input_line}'", "is not of the form key=value")
        if key in _groups(conf) and not override.is_delete() and not isinstance(value, str | dict | Sweep):
            return ConfigError(key, value, "needs the name of a choice", _files(conf / key))
        if override.is_sweep_override() and "Ambiguous" in str(error):
            text = str(override.input_line).partition("=")[2]
            return ConfigError(key, text, f"a list is written [{text}]; for a run with each value add --multirun")
    cause = error.__cause__ if isinstance(error, ConfigCompositionException) and error.__cause__ else error
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        key = str(cause.full_key or cause.key)
        parent, _, _ = key.rpartition(".")
        known = keys_of(parent, conf, config_name, overrides)
        return config_error(
            key, "no such key" if known != [] else f"no such key; to add it write +{key}=…", known or ()
        )
    if isinstance(cause, OmegaConfBaseException):
        return one_line(cause)
    return config_error("configuration", str(error) or type(error).__name__)


def keys_of(parent: str, conf: Path, config_name: str, overrides: Sequence[Override]) -> list[str] | None:
    """The keys below ``parent``, composed with the groups that the command line picked and without its values.

    ``None`` where ``parent`` is not there or holds no keys.
    """
    groups = _groups(conf)
    picked = [str(override.input_line) for override in overrides if override.key_or_group in groups]
    try:
        composed = compose(conf, config_name, picked)
        node = OmegaConf.select(composed, parent) if parent else composed
    except (HydraException, OmegaConfBaseException):
        return None
    return [str(key) for key in node] if isinstance(node, DictConfig) else None


def compose(conf: Path, config_name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """What Hydra composes from the overrides, outside a command line."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(conf.resolve()), version_base="1.3"):
        return hydra.compose(config_name, list(overrides))


def _overrides(arguments: Sequence[str]) -> list[Override]:
    overrides: list[Override] = OverridesParser.create().parse_overrides(
        get_args_parser().parse_known_args(list(arguments))[0].overrides
    )
    return overrides


def _groups(conf: Path) -> set[str]:
    return {path.relative_to(conf).as_posix() for path in conf.rglob("*") if path.is_dir()}


def _files(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))
