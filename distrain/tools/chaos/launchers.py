"""Ways to start the processes of a training."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from distrain.errors import ConfigError
from distrain.runtime import program
from distrain.tools.testnet.network import VirtualNetwork


class Launcher(Protocol):
    """Starts the processes of a training."""

    def start(self, keys: Sequence[str], variables: Mapping[str, str], output: Path) -> list[subprocess.Popen[bytes]]:
        """Starts a training.

        Args:
            keys: The training's configuration keys, ``run_dir`` included.
            variables: Environment variables to add.
            output: File to which everything printed is appended.

        Returns:
            The processes that were started directly.
        """


class CommandLauncher:
    """Starts the user's command on this host.

    Args:
        template: The command, with the placeholders ``{python}``, ``{train}``, ``{nproc}`` and ``{keys}``. ``{train}``
            is what Python or torchrun runs to train.
        nproc: Number of ranks.

    Raises:
        ConfigError: The template lacks ``{keys}`` or has unknown placeholders.
    """

    def __init__(self, template: str, nproc: int) -> None:
        self._template = template
        self._words = {"python": [sys.executable], "train": program.starting("train"), "nproc": [str(nproc)]}
        if "{keys}" not in template:
            raise ConfigError("launcher", template, "needs {keys}, which stands for the training's keys")
        self.command([])

    def command(self, keys: Sequence[str]) -> list[str]:
        """The command's arguments for these keys."""
        words: list[str] = []
        values = {**self._words, "keys": list(keys)}
        joined = {name: shlex.join(value) for name, value in values.items()}
        try:
            for word in shlex.split(self._template):
                name = word[1:-1]
                words += values[name] if word == f"{{{name}}}" and name in values else [word.format(**joined)]
        except (ValueError, KeyError, IndexError) as error:
            allowed = ", ".join(f"{{{name}}}" for name in values)
            raise ConfigError(
                "launcher", self._template, f"can't be filled in ({error}); allowed placeholders: {allowed}"
            ) from error
        return words

    def start(self, keys: Sequence[str], variables: Mapping[str, str], output: Path) -> list[subprocess.Popen[bytes]]:
        """Starts the command in a session of its own, so that a terminal's Ctrl-C does not reach it."""
        with output.open("ab") as file:
            process = subprocess.Popen(
                self.command(keys),
                env={**os.environ, **variables},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return [process]


class HostPerRankLauncher:
    """Starts each rank on its own host of a test network, without a launcher that ends the others when one fails.

    Args:
        network: Has as many hosts as there are ranks.
    """

    def __init__(self, network: VirtualNetwork) -> None:
        self.network = network

    def start(self, keys: Sequence[str], variables: Mapping[str, str], output: Path) -> list[subprocess.Popen[bytes]]:
        """Starts a rank on every host."""
        command = [sys.executable, *program.starting("train"), *keys]
        return [self.network.start(host, command, variables, output) for host in range(self.network.hosts)]
