"""``launch/hosts.py``: trains on several hosts over ssh."""

from __future__ import annotations

import random
import shlex
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distrain.cli import hydra_entry
from distrain.config.load import load_config
from distrain.config.schema import setting
from distrain.errors import ConfigError
from distrain.tools.launching.hosts import Agent

#: Below the ports that systems hand out for outgoing connections.
_PORTS = (20000, 29999)


@dataclass
class HostsSettings:
    """Keys of ``launch/hosts.py``."""

    hosts: list[str] = setting("Where to start a torchrun agent, as ssh takes it: [a, me@b].")
    addresses: list[str] | None = setting("How the hosts reach each other, in their order; null: by those names.")
    nproc: str = setting("Ranks a host: a number, or torchrun's gpu, cpu or auto.")
    ssh: str = setting("The command that takes a host and what to run there.")
    python: str | None = setting("The interpreter on the hosts; null: this one's path.")
    folder: str | None = setting("The folder on the hosts to run in; null: this one's path.")
    script: str | None = setting("The script on the hosts; null: launch/train.py at its path here.")
    env: dict[str, str] = setting("Variables for the ranks; ssh hands none on by itself.")
    port: int | None = setting("Where the hosts meet, on the first; null: a random one.", at_least=1, at_most=65535)
    torchrun: list[str] = setting("More options for torchrun.")
    grace_seconds: float = setting("Time to save and end before being killed.", at_least=0)


def parted(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before ``--`` and is for ``launch/hosts.py``, and what stands behind it and is for the script."""
    place = list(arguments).index("--") if "--" in arguments else len(arguments)
    return list(arguments[:place]), list(arguments[place + 1 :])


def check(conf: Path, arguments: Sequence[str]) -> None:
    """Refuses a training's mistakes here, once, rather than on every host.

    Args:
        conf: The folder of YAML files.
        arguments: The training's settings.

    Raises:
        ConfigError: One line that names the key, the value and the choices.
    """
    try:
        load_config(hydra_entry.compose(conf, "config", arguments))
    except ConfigError:
        raise
    except Exception as error:  # Hydra and YAML have many kinds for what is wrong with the user's words
        raise hydra_entry.explain(error, conf, "config", arguments) from error


def plan(settings: HostsSettings, script: Path, arguments: Sequence[str]) -> list[Agent]:
    """The command for each host.

    Args:
        settings: The checked keys.
        script: What to run where ``settings.script`` names nothing else.
        arguments: Handed to the script.

    Raises:
        ConfigError: There is no host, a name would be taken for an option, or addresses don't match the hosts.
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
    meeting = uuid.uuid4().hex
    python = settings.python or sys.executable
    agents = []
    for place, (host, address) in enumerate(zip(settings.hosts, addresses, strict=True)):
        torchrun = [
            *("-m", "torch.distributed.run", "--nnodes", str(len(addresses)), "--nproc-per-node", settings.nproc),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{addresses[0]}:{port}", "--rdzv-id", meeting),
            # Said, because torchrun's own guess needs names that resolve alike on all hosts.
            *("--rdzv-conf", f"is_host={int(place == 0)}", "--local-addr", address),
            *settings.torchrun,
        ]
        words = [
            *("exec", "env", *(f"{name}={value}" for name, value in settings.env.items())),
            *(python, "-m", "distrain.tools.launching.agent", f"{settings.grace_seconds:g}", python),
            *(*torchrun, settings.script or str(script), *arguments),
        ]
        there = f"cd {shlex.quote(settings.folder or str(Path.cwd()))} && {shlex.join(words)}"
        agents.append(Agent(host, (*ssh, host, there)))
    return agents
