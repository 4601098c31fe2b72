"""Runs a command under Hydra's command line, with errors on one line and defined exit codes.

A wrong setting prints one line and exits with code 2; a traceback appears only with ``HYDRA_FULL_ERROR=1``. A run that
failed has already reported its error; it exits with code 1. A run that stopped early on request and saved its state
exits with code 75.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Sweep
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from distrain.cli import key_help
from distrain.cli.arguments import (
    open_mappings,
    options_first,
    parse,
    place_loggers,
    quote_home_folders,
    quoted,
    refuse_misread_paths,
    refuse_python_objects,
    unparsable,
)
from distrain.cli.config_files import HYDRA_VERSION_BASE, ConfigFiles, leaves
from distrain.cli.typed_help import printed_as_started
from distrain.config.key_search import same_name, schema_docs, similar_keys
from distrain.config.load import config_error_from_omegaconf
from distrain.config.registry import selectable
from distrain.config.schema import Config
from distrain.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OUTPUT_CLOSED,
    EXIT_REFUSED,
    EXIT_STOPPED,
    ConfigError,
    Failed,
    Stopped,
    config_error,
)
from distrain.files.terminal import TERMINAL, escape_everything
from distrain.health import last_line
from distrain.runtime import program
from distrain.runtime.signals import STOPPING
from distrain.tools.launching import launch_keys
from distrain.tools.launching.launch_keys import LaunchSettings

#: Seconds that the other ranks of a host wait before they print an error that the host's first rank may have printed.
_FIRST_RANK_SECONDS = 2

#: Name of the file with the keys of a training.
_TRAINING = "config"

#: Checks a composed configuration for the ranks that are to be started; raises a ConfigError.
Check = Callable[[DictConfig, LaunchSettings], None]

#: HYDRA_FULL_ERROR as the user set it, for processes started from here; :func:`main` changes the variable itself.
user_hydra_full_error: str | None = None


class ExitWithCode(Exception):
    """Ends the process with an exit code; everything that the user should know has been printed."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


def main(
    task: Callable[[DictConfig], object],
    conf: Path,
    config_name: str,
    schema: Callable[[], type[Any]] = lambda: Config,
    check: Check | None = None,
) -> None:
    """Composes the configuration from ``sys.argv``, runs the task, and ends the process on errors.

    With ``nproc=N`` the configuration is checked, and the same command is started as N ranks.

    Args:
        task: Takes the composed configuration.
        conf: The folder of YAML files.
        config_name: Name of the primary file, without ``.yaml``.
        schema: Returns the dataclass of the command's keys, which may take an import of torch.
        check: Refuses what ranks would refuse; ``None`` if the command can't start any.
    """
    global user_hydra_full_error
    escape_everything()
    user_hydra_full_error = os.environ.get("HYDRA_FULL_ERROR")
    wants_traceback = user_hydra_full_error not in (None, "", "0")
    # Otherwise Hydra prints errors in its own way and exits with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    composing = True
    launch: LaunchSettings | None = None
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Skips the interpreter's garbage collection of all objects at exit, which takes 0.3 s after importing torch.
    atexit.register(gc.freeze)

    # Hydra names the job after the module that the task comes from.
    @functools.wraps(task)
    def guarded_task(composed: DictConfig) -> None:
        nonlocal composing
        composing = False
        # Errors end the process here, because Hydra would add lines of its own to them.
        with ended_as_command(wants_traceback=wants_traceback):
            if launch is None or check is None:
                task(composed)
            else:
                _start_ranks(launch, check, composed)

    decorated: Any = hydra.main(
        version_base=HYDRA_VERSION_BASE, config_path=str(conf.resolve()), config_name=config_name
    )(guarded_task)
    try:
        launch_arguments = [] if check is None else _pop_launch_arguments()
        sys.argv[1:] = options_first(sys.argv[1:])
        _check_options(sys.argv[1:])
        sys.argv[1:] = open_mappings(quote_home_folders(place_loggers(sys.argv[1:])))
        refuse_misread_paths(sys.argv[1:], schema)
        refuse_python_objects(sys.argv[1:])
        files = ConfigFiles.of_command(conf, config_name, sys.argv[1:])
        if explain_keys(sys.argv[1:], files, schema, launches=check is not None):
            return
        if not launch_keys.is_rank():
            launch = launch_keys.check(launch_arguments, sys.argv[1:], os.environ)
        with printed_as_started() if {"-h", "--help"} & set(sys.argv[1:]) else contextlib.nullcontext():
            decorated()
    except ExitWithCode as error:
        sys.exit(error.code)
    except KeyboardInterrupt:
        # Outside a run, which saves first; see distrain.runtime.signals.
        last_line.print_last_line("distrain: interrupted")
        exit_now(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # Such as help that is piped to `head`; a run has its own handling.
        exit_now(EXIT_OUTPUT_CLOSED)
    except Exception as error:  # Hydra and YAML raise many types for a user's mistakes
        if wants_traceback or not composing:
            last_line.tell_launcher(f"distrain: {type(error).__name__}: {error}")
            raise
        exit_refused(
            error
            if isinstance(error, ConfigError)
            else to_config_error(error, conf, config_name, sys.argv[1:], launches=check is not None)
        )
    skip_destructors_after_communication()


@contextlib.contextmanager
def ended_as_command(*, wants_traceback: bool = False) -> Iterator[None]:
    """Ends the process with the exit code of what is raised in this block, and says why in one line.

    Args:
        wants_traceback: Errors that one line would describe are raised instead.
    """
    try:
        yield
    except ConfigError as error:
        if wants_traceback:
            raise
        exit_refused(error)
    except ExitWithCode as error:
        if error.code:
            last_line.tell_launcher("distrain: failed, for the reason printed above")
        # Hydra says nothing about this exception, unlike about others.
        sys.exit(error.code)
    except Stopped as stopped:
        last_line.tell_launcher(f"distrain: {stopped}, saved")
        # The launcher may send a signal to this rank because another one has just exited with the same code.
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)
        exit_now(EXIT_STOPPED)
    except Failed as failed:
        last_line.tell_launcher("distrain: failed, for the reason printed above")
        # Threads of the process group may still wait for a lost peer, so nothing is cleaned up.
        exit_now(failed.exit_code)
    except OSError as error:
        if wants_traceback:
            raise
        last_line.print_last_line(f"distrain: {type(error).__name__}: {error} (HYDRA_FULL_ERROR=1 shows where)")
        raise ExitWithCode(EXIT_FAILED) from error


def skip_destructors_after_communication() -> None:
    """Lets the process exit without destructors if it was part of a process group.

    Those that run while torch's communication threads end abort about 3 % of runs of several ranks with "terminate
    called without an active exception".
    """
    runtime = sys.modules.get("distrain.runtime.runtime")
    if runtime is not None and runtime.joined_group:
        atexit.register(exit_now, 0)


@contextlib.contextmanager
def gc_disabled() -> Iterator[None]:
    """Disables garbage collection while importing: importing torch takes a tenth longer with it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _pop_launch_arguments() -> list[str]:
    """Removes ``nproc=N`` and the like from this process's command line, and returns them."""
    arguments = sys.argv[1:]
    popped = launch_keys.pop(arguments)
    sys.argv[1:] = arguments
    program.remember_removed(popped)
    return popped


def _start_ranks(launch: LaunchSettings, check: Check, composed: DictConfig) -> NoReturn:
    """Checks the configuration, starts the ranks, and ends this process as they end."""
    quiets_torch = "TORCH_CPP_LOG_LEVEL" not in os.environ
    if quiets_torch:
        # Read when torch is imported. Hosts leave one after another, of which torch's store would warn with its stack.
        os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    check(composed, launch)
    with gc_disabled():
        # Imported here because it imports torch, which most errors need not wait for.
        from distrain.tools.launching import elastic
    if quiets_torch:
        del os.environ["TORCH_CPP_LOG_LEVEL"]
    restore_hydra_full_error()
    exit_now(elastic.run_ranks(launch, *elastic.own_command()).code)


def set_arguments(arguments: Sequence[str] | None) -> None:
    """Takes these arguments as this process's command line; ``None`` keeps it. Hydra reads ``sys.argv`` only."""
    if arguments is not None:
        sys.argv[1:] = arguments


def pop_command(arguments: list[str]) -> list[str]:
    """Removes ``-- COMMAND…``, which Hydra must not parse, from the end of ``arguments`` and returns the command."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    command = arguments[split + 1 :]
    del arguments[split:]
    return command


def restore_hydra_full_error() -> None:
    """Restores HYDRA_FULL_ERROR, which :func:`main` changed, before other programs inherit it."""
    os.environ.pop("HYDRA_FULL_ERROR", None)
    if user_hydra_full_error is not None:
        os.environ["HYDRA_FULL_ERROR"] = user_hydra_full_error


def exit_refused(error: ConfigError) -> NoReturn:
    """Prints the error, once per host, and exits with ``EXIT_REFUSED``."""
    if os.environ.get("LOCAL_RANK", "0") != "0" and not last_line.is_launcher_ours():
        # The launcher ends all ranks as soon as one has exited. Rank 0 of the host exits first and prints the line; a
        # rank that is still running after the wait found an error that rank 0 did not have.
        time.sleep(_FIRST_RANK_SECONDS)
    last_line.print_last_line(f"distrain: {error}")
    sys.exit(EXIT_REFUSED)


def require_linux(command: str, reason: str) -> None:
    """Ends the process with one line and exit code 2 on another system.

    Args:
        command: The command that can't run there.
        reason: What it uses of Linux, after "needs Linux, since it".
    """
    if sys.platform != "linux":
        exit_refused(config_error(command, f"needs Linux, since it {reason}"))


def exit_now(code: int) -> NoReturn:
    """Ends the process at once, without destructors."""
    try:
        logging.shutdown()
        TERMINAL.flush()
        # Output to a full disk must not change the exit code.
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
    finally:
        os._exit(code)


def _check_options(arguments: Sequence[str]) -> None:
    parser = get_args_parser()
    parser.exit_on_error = False
    try:
        options, unknown = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise config_error("command line", str(error)) from error
    if unknown:
        raise config_error(
            f"argument '{unknown[0]}'", "no such option; settings are key=value, without dashes; see --help"
        )
    if options.experimental_rerun is not None:
        raise ConfigError(
            "--experimental-rerun", options.experimental_rerun, "reads a pickle, which could run any code"
        )


def to_config_error(
    error: BaseException, conf: Path, config_name: str, arguments: Sequence[str], *, launches: bool = False
) -> ConfigError:
    """Turns an error of Hydra or OmegaConf into one line that names the key, the value and the choices.

    Args:
        error: What composing the configuration raised.
        conf: The folder of YAML files.
        config_name: Name of the primary file, without ``.yaml``.
        arguments: The command line that was composed.
        launches: Whether the command has the keys of :class:`~distrain.tools.launching.launch_keys.LaunchSettings`.
    """
    try:
        files = ConfigFiles.of_command(conf, config_name, arguments)
    except ConfigError as no_folder:
        return no_folder
    if isinstance(error, MissingConfigException):
        group, _, name = str(error.missing_cfg_file or "").rpartition("/")
        options = selectable(map(str, error.options or ())) or files.choices(group)
        return ConfigError(group or config_name, name, "no such choice", options)
    if isinstance(error, OverrideParseException):
        return unparsable(str(error.override), arguments)
    overrides = _overrides(arguments)
    groups = files.groups()
    for override in overrides:
        key, value = override.key_or_group, override.value()
        if not key:
            return config_error(f"argument '{override.input_line}'", "is not of the form key=value")
        if key in groups and not override.is_delete() and not isinstance(value, str | dict | Sweep):
            return ConfigError(key, value, "needs the name of a choice", files.choices(key))
        if override.is_sweep_override() and "Ambiguous" in str(error):
            text = str(override.input_line).partition("=")[2]
            problem = f"a list is written [{text}]; to run once with each value add --multirun"
            return ConfigError(key, text, f"{problem}; for a text with commas type {quoted(key, text)}")
    cause = error.__cause__ if isinstance(error, ConfigCompositionException) and error.__cause__ else error
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        key = str(cause.full_key or cause.key)
        parent, _, _ = key.rpartition(".")
        group_overrides = [str(override.input_line) for override in overrides if override.key_or_group in groups]
        known = known_keys(parent, files, group_overrides)
        problem = "no such key" if known != [] else f"no such key; to add it write +{key}=…"
        extra = launch_keys.docs() if launches and not parent else {}
        meant = _meant(key, files, overrides, group_overrides, extra)
        return config_error(key, problem, [*(known or ()), *extra], meant=meant)
    if isinstance(cause, OmegaConfBaseException):
        return config_error_from_omegaconf(cause)
    return config_error("configuration", str(error) or type(error).__name__)


def known_keys(parent: str, files: ConfigFiles, group_overrides: Sequence[str]) -> list[str] | None:
    """Looks up the keys below ``parent``, composed with the command line's groups but without its values.

    Returns:
        The keys, or ``None`` if ``parent`` does not exist or is no mapping.
    """
    try:
        composed = files.compose(group_overrides)
        node = OmegaConf.select(composed, parent) if parent else composed
    except (HydraException, OmegaConfBaseException):
        return None
    return [str(key) for key in node] if isinstance(node, DictConfig) else None


def _meant(
    key: str,
    files: ConfigFiles,
    overrides: Sequence[Override],
    group_overrides: Sequence[str],
    extra: Mapping[str, str],
) -> list[str]:
    """What to type instead of a setting whose key does not exist, as far as it can be guessed.

    Args:
        key: The key.
        files: The command's YAML files.
        overrides: The command line.
        group_overrides: Those that choose a file.
        extra: Other keys that there are, with their meaning.
    """
    typed = next((o for o in overrides if o.key_or_group == key or o.key_or_group.startswith(f"{key}.")), None)
    full_key = key if typed is None else typed.key_or_group
    value = "" if typed is None else str(typed.input_line).partition("=")[2]
    here = {**all_keys(files, group_overrides), **extra}
    found = [f"{name}={value}" for name in same_name(full_key, here)]
    if not found and files.name == _TRAINING:
        elsewhere = files.keys_of_choices()
        found = [f"{name}={value} with {elsewhere[name]}" for name in same_name(full_key, elsewhere)]
    return found or [f"{name}={value}" for name in similar_keys(full_key, here)]


def all_keys(files: ConfigFiles, group_overrides: Sequence[str]) -> dict[str, str]:
    """Every key of a command, dotted, with its meaning where that is known without importing torch."""
    try:
        composed = files.compose(group_overrides)
    except (HydraException, OmegaConfBaseException):
        return {}
    docs = schema_docs(Config) if files.name == _TRAINING else {}
    content = OmegaConf.to_container(composed)
    return {key: docs.get(key, "") for key in leaves(content)}


def explain_keys(
    arguments: Sequence[str], files: ConfigFiles, schema: Callable[[], type[Any]], *, launches: bool = False
) -> bool:
    """Prints what ``--help KEY …`` asks for.

    Args:
        arguments: The command line.
        files: The YAML files of the command.
        schema: Returns the dataclass of the command's keys.
        launches: Whether the command has the keys of :class:`~distrain.tools.launching.launch_keys.LaunchSettings`.

    Returns:
        Whether the command line asks for the explanation of a key.

    Raises:
        ConfigError: There is no such key.
    """
    options = parse(arguments)
    names = [argument for argument in options.overrides if "=" not in argument and argument[:1].isalpha()]
    if not (options.help and names):
        return False
    composed = files.compose([argument for argument in options.overrides if argument not in names])
    choices = {group: files.choices(group) for group in sorted(files.groups())} if files.name == _TRAINING else {}
    for name in names:
        if launches and name in launch_keys.docs():
            print(key_help.explain(name, LaunchSettings, launch_keys.defaults(), {}))
        else:
            print(key_help.explain(name, schema(), composed, choices))
    return True


def compose(conf: Path, config_name: str, arguments: Sequence[str] = ()) -> DictConfig:
    """Composes a configuration as Hydra does on a command line.

    Args:
        conf: The folder of YAML files.
        config_name: Name of the primary file, without ``.yaml``.
        arguments: Settings, in Hydra's syntax, and the option ``--config-dir``.

    Raises:
        ConfigError: ``--config-dir`` names no folder.
    """
    overrides = parse(arguments).overrides
    return ConfigFiles.of_command(conf, config_name, arguments).compose(overrides)


def _overrides(arguments: Sequence[str]) -> list[Override]:
    overrides: list[Override] = OverridesParser.create().parse_overrides(parse(arguments).overrides)
    return overrides
