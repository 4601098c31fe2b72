"""``distrain hosts``: trains on several hosts over ssh, with a torchrun agent on each."""

from __future__ import annotations

import random
import shlex
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distrain.cli import hydra_entry
from distrain.cli.arguments import refuse_python_objects
from distrain.config.load import load_config
from distrain.config.setting import setting
from distrain.errors import ConfigError
from distrain.tools.launching.hosts import HostCommand, run_on_hosts

#: First and last rendezvous port to choose from; below the ports that systems use for outgoing connections.
_PORTS = (20000, 29999)


@dataclass
class HostsSettings:
    """Keys of ``distrain hosts``."""

    hosts: list[str] = setting("Hosts to start a torchrun agent on, as ssh takes them: [a, me@b].")
    addresses: list[str] | None = setting("How hosts reach each other, in the order of hosts; null: by those names.")
    nproc: str = setting("Ranks per host: a number, or torchrun's gpu, cpu or auto.")
    ssh: str = setting("The ssh command; gets a host and a command line for it.")
    python: str | None = setting("The interpreter on the hosts; null: the path of this one.")
    folder: str | None = setting("The working folder on the hosts; null: the path of this one.")
    script: str | None = setting("The script on the hosts; null: distrain train.")
    env: dict[str, str] = setting("Environment variables for the ranks; ssh passes none on by itself.")
    port: int | None = setting("Rendezvous port on the first host; null: a random one.", at_least=1, at_most=65535)
    torchrun: list[str] = setting("More options for torchrun.")
    grace_seconds: float = setting("Seconds that ranks have to save before they are killed.", at_least=0)


def run(settings: HostsSettings, conf: Path, arguments: Sequence[str]) -> int:
    """Trains on all hosts.

    Args:
        settings: The command line before ``--``.
        conf: The folder of YAML files.
        arguments: The command line behind ``--``: the training's settings.

    Returns:
        The exit code.

    Raises:
        ConfigError: A setting, of this command or of the training, is wrong.
    """
    if settings.script is None:
        check_training(conf, arguments)
    return run_on_hosts(host_commands(settings, arguments), settings.grace_seconds)


def check_training(conf: Path, arguments: Sequence[str]) -> None:
    """Refuses wrong settings of the training once here, rather than on every host.

    Args:
        conf: The folder of YAML files.
        arguments: The training's settings.

    Raises:
        ConfigError: A setting is wrong; the message is one line that names the key, the value and the choices.
    """
    try:
        refuse_python_objects(arguments)
        load_config(hydra_entry.compose(conf, "config", arguments))
    except ConfigError:
        raise
    except Exception as error:  # Hydra and YAML raise many types for a user's mistakes
        raise hydra_entry.to_config_error(error, conf, "config", arguments) from error


def host_commands(settings: HostsSettings, arguments: Sequence[str]) -> list[HostCommand]:
    """Returns the command to run for each host.

    Args:
        settings: The checked keys.
        arguments: Arguments of ``distrain train``, or of the script that ``settings.script`` names.

    Raises:
        ConfigError: No host is given, a name would be taken for an option of ssh, or addresses don't match the hosts.
    """
    if not settings.hosts:
        raise ConfigError("hosts", "[]", "name at least one host")
    for host in settings.hosts:
        if not host or host.startswith("-"):
            raise ConfigError("hosts", host, "is not the name of a host")
    addresses = settings.addresses or [host.rpartition("@")[2] for host in settings.hosts]
    if len(addresses) != len(settings.hosts):
        raise ConfigError("addresses", addresses, f"needs one for each of the {len(settings.hosts)} hosts")
    ssh = shlex.split(settings.ssh)
    if not ssh:
        raise ConfigError("ssh", settings.ssh, "is not a command")
    port = settings.port or random.randint(*_PORTS)
    rendezvous_id = uuid.uuid4().hex
    python = settings.python or sys.executable
    # As the agent is found, in the environment of the interpreter or in the working folder.
    started = [settings.script] if settings.script else ["-m", "distrain", "train"]
    commands = []
    for index, (host, address) in enumerate(zip(settings.hosts, addresses, strict=True)):
        torchrun = [
            *("-m", "torch.distributed.run", "--nnodes", str(len(addresses)), "--nproc-per-node", settings.nproc),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{addresses[0]}:{port}", "--rdzv-id", rendezvous_id),
            # Given explicitly, because torchrun's own guess needs names that resolve alike on all hosts.
            *("--rdzv-conf", f"is_host={int(index == 0)}", "--local-addr", address),
            *settings.torchrun,
        ]
        words = [
            *("exec", "env", *(f"{name}={value}" for name, value in settings.env.items())),
            *(python, "-m", "distrain.tools.launching.agent", f"{settings.grace_seconds:g}", python),
            *(*torchrun, *started, *arguments),
        ]
        remote_line = f"cd {shlex.quote(settings.folder or str(Path.cwd()))} && {shlex.join(words)}"
        commands.append(HostCommand(host, (*ssh, host, remote_line)))
    return commands
