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
        template: The command, with the placeholders ``{python}``, ``{launch}``, ``{nproc}`` and ``{keys}``.
        launch: The folder of distrain's ``train.py``.
        nproc: Number of ranks.

    Raises:
        ConfigError: The template lacks ``{keys}`` or has unknown placeholders.
    """

    def __init__(self, template: str, launch: Path, nproc: int) -> None:
        self._template = template
        self._values = {"python": sys.executable, "launch": str(launch), "nproc": str(nproc)}
        if "{keys}" not in template:
            raise ConfigError("launcher", template, "needs {keys}, which stands for the training's keys")
        self.command([])

    def command(self, keys: Sequence[str]) -> list[str]:
        """The command's arguments for these keys."""
        words: list[str] = []
        try:
            for word in shlex.split(self._template):
                if word == "{keys}":
                    words += keys
                else:
                    words.append(word.format(**self._values, keys=shlex.join(keys)))
        except (ValueError, KeyError, IndexError) as error:
            allowed = ", ".join(f"{{{name}}}" for name in [*self._values, "keys"])
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
        launch: The folder of distrain's ``train.py``.
    """

    def __init__(self, network: VirtualNetwork, launch: Path) -> None:
        self.network = network
        self._launch = launch

    def start(self, keys: Sequence[str], variables: Mapping[str, str], output: Path) -> list[subprocess.Popen[bytes]]:
        """Starts ``train.py`` on every host."""
        command = [sys.executable, str(self._launch / "train.py"), *keys]
        return [self.network.start(host, command, variables, output) for host in range(self.network.hosts)]
