"""``distrain NAME …``: finds the command by its name and lists all of them. Imports neither torch nor Hydra."""

from __future__ import annotations

import importlib
import signal
import sys
from typing import NoReturn

import distrain
from distrain.cli import completion
from distrain.errors import EXIT_REFUSED, ConfigError, config_error
from distrain.files.terminal import print_to_stderr
from distrain.runtime import program

#: What each command does, in one line. The command NAME is ``main`` in ``distrain/cli/commands/NAME.py``.
COMMANDS = {
    "train": "train a model, on one rank or under torchrun on many",
    "evaluate": "compute the metrics of a run's checkpoint",
    "predict": "predict the classes of images by a run's model",
    "export": "write a run's model as a file that is readable without distrain",
    "serve": "answer HTTP requests with a run's model",
    "verify": "certify that a training on several ranks is that of one process, or say where it parts",
    "plan": "predict what a step takes under each strategy, on these ranks or on a described cluster",
    "find": "find a learning rate by a short training in which it rises",
    "sweep": "train with each combination of values; one table of the results",
    "watch": "show a run that goes on: its ranks, how far each is, speed, last loss",
    "compare": "show runs side by side, as a table and as a page with curves",
    "doctor": "examine this machine, or all machines of a job and their network",
    "hosts": "train on several machines over ssh",
    "testnet": "simulate several machines and their network on this one",
    "chaos": "injure trainings, and check that they recover with the same result",
}


def run(arguments: list[str]) -> None:
    """Runs a command.

    Args:
        arguments: ``sys.argv``; the command's name is removed from it.

    Raises:
        SystemExit: The command has ended, or there is no such command.
    """
    name = arguments[1] if len(arguments) > 1 else ""
    following = arguments[2] if len(arguments) > 2 else ""
    if name in ("-h", "--help", ""):
        print(overview())
        sys.exit(0 if name else EXIT_REFUSED)
    if name == "--version":
        print(f"distrain {distrain.__version__}")
    elif name == "--completion" or (following in ("-sc", "--shell-completion") and "install=" in arguments[-1]):
        try:
            # The second is how a single command of Hydra is asked; its own script knows no commands.
            print(completion.script(arguments[-1].removeprefix("install=") if name in COMMANDS else following), end="")
        except ConfigError as error:
            _refuse(error)
    elif name == "--complete":
        completion.print_candidates(following, list(COMMANDS))
    elif name not in COMMANDS:
        problem = "no such command"
        if "=" in name:
            problem += "; settings follow a command, as in: distrain train strategy=ddp"
        _refuse(config_error(name, problem, COMMANDS))
    else:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            # Ctrl-C while modules are imported ends the process, without a traceback of imports.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        del arguments[1]
        program.remember(name)
        importlib.import_module(f"distrain.cli.commands.{name}").main()


def _refuse(error: ConfigError) -> NoReturn:
    print_to_stderr(f"distrain: {error}")
    sys.exit(EXIT_REFUSED)


def overview() -> str:
    """What ``distrain --help`` prints: one line for each command."""
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: distrain COMMAND key=value ...",
            "",
            *(f"  {name:{width}}  {purpose}" for name, purpose in COMMANDS.items()),
            "",
            "distrain COMMAND --help                explains a command and its keys",
            "distrain --version                     prints the version",
            'eval "$(distrain --completion bash)"   completes commands, choices and keys in this shell; also zsh, fish',
        ]
    )
