"""``distrain doctor``: examines this machine, or all hosts of a job if started on each of them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from distrain.cli import output
from distrain.config.setting import setting
from distrain.errors import ConfigError, Failed, config_error
from distrain.files.escaping import Lines
from distrain.files.terminal import print_to_stderr, show
from distrain.runtime.world import World
from distrain.tools.doctor import interfaces, report
from distrain.tools.doctor.examination import Examination
from distrain.tools.doctor.facts import gather_facts
from distrain.tools.doctor.findings import Finding, diagnose
from distrain.tools.doctor.job import examine_job
from distrain.tools.doctor.rendezvous import RendezvousFailed

_RATE_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


@dataclass
class DoctorSettings:
    """Keys of ``distrain doctor``."""

    address: str | None = setting("HOST:PORT where ranks meet; null: MASTER_ADDR and MASTER_PORT.")
    ranks: int | None = setting("Number of ranks; null: WORLD_SIZE.", at_least=1)
    rank: int | None = setting("This rank, counted from 0; null: RANK.", at_least=0)
    wait: float = setting("Seconds to wait for all ranks to arrive.", above=0)
    expect: str | None = setting("Bandwidth that each link should have, like 1gbit; null: compare with nothing.")
    threads: int | None = setting("The job's runtime.threads; null: not set.", at_least=1)
    output: str | None = setting("File for all results (JSON), written by rank 0; null: none.", path=True)
    export: bool = setting("Only print the lines that set the right interface on this host, for a shell's eval.")


def run(settings: DoctorSettings, command: Sequence[str]) -> list[Finding]:
    """Examines this rank, or all ranks of a job, and prints a report.

    Args:
        settings: The command line before ``--``.
        command: The command behind ``--``. If there is one, it replaces this process, with the right network
            interface set in its environment, and nothing is examined.

    Returns:
        All findings on rank 0. On other ranks, or if ranks could not meet, those about this rank alone.

    Raises:
        ConfigError: A setting cannot be used.
        Failed: A problem was found and printed.
    """
    world, host, port = _world_and_rendezvous(settings)
    expected = _parse_rate("expect", settings.expect)
    target = Path(settings.output) if settings.output is not None else None
    if target is not None and world.rank == 0:
        output.check_writable(target)
    if settings.export or command:
        _set_interface(host, command)
        return []
    own = gather_facts(world, host)
    unreachable: list[Finding] = []
    examination = Examination(1, settings.wait, {world.rank: own}, expected=expected, threads=settings.threads)
    if world.size > 1:
        try:
            examination = examine_job(world, host, port, own, examination)
        except RendezvousFailed as error:
            # Findings about this rank alone may show why. Size 0 keeps the other ranks from counting as missing.
            examination = dataclasses.replace(examination, size=0)
            unreachable.append(Finding(error.kind, f"{own.label}: {error.problem}", error.advice))
    findings = [*unreachable, *diagnose(examination)]
    if world.rank == 0:
        show(Lines.of(report.format_report(examination, findings).removesuffix("\n").split("\n")))
        if target is not None:
            output.write_text(target, json.dumps(report.as_json(examination, findings), indent=2) + "\n")
    elif unreachable:
        show(Lines.of([own.label, *report.format_findings(findings).split("\n")]))
    if any(finding.wrong for finding in findings):
        raise Failed
    return findings


def _world_and_rendezvous(settings: DoctorSettings) -> tuple[World, str, int]:
    """Returns this rank's place among all ranks, and host and port where they meet."""
    world = World.from_environment()
    if settings.ranks is not None or settings.rank is not None:
        size = settings.ranks or world.size
        rank = world.rank if settings.rank is None else settings.rank
        # A rank that was typed by hand is the only one of its host unless a launcher says otherwise.
        local_size = world.local_size if "LOCAL_WORLD_SIZE" in os.environ else 1
        world = dataclasses.replace(world, rank=rank, size=size, local_size=local_size)
    if world.rank >= world.size:
        raise ConfigError("rank", world.rank, f"there are {world.size} ranks, counted from 0")
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if settings.address is not None:
        host, colon, port = settings.address.rpartition(":")
        if not colon:
            raise ConfigError("address", settings.address, "must be HOST:PORT, the same on all ranks")
    if world.size > 1 and not (host and port.isdigit()):
        raise config_error("address", f"{world.size} ranks need HOST:PORT of rank 0's host, where they meet")
    return world, host.strip("[]"), int(port) if port.isdigit() else 0


def _parse_rate(key: str, text: str | None) -> float | None:
    """Returns bytes per second."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+\.?\d*)(kbit|mbit|gbit)", text)
    if match is None:
        raise ConfigError(key, text, "must be a rate like 100mbit or 1gbit")
    return float(match[1]) * _RATE_UNITS[match[2]] / 8


def _set_interface(host: str, command: Sequence[str]) -> None:
    """Finds the interface that leads to the rendezvous host, or out of this host if there is none.

    Prints the variables that select it, or runs ``command`` with them in place of this process.
    """
    here = interfaces.addresses()
    target = interfaces.resolve(host).address if host else ""
    if host and not target:
        raise ConfigError("address", host, "doesn't resolve; give an address")
    own = interfaces.source_address(target) if target else interfaces.source_address()
    if interfaces.is_loopback(own) or not own:
        # This host is the rendezvous, and its name resolves to the loopback.
        outside = [address for address in here.values() if not interfaces.is_loopback(address)]
        own = outside[0] if len(outside) == 1 else interfaces.source_address()
    name = interfaces.interface_of(own, here)
    if not name:
        raise config_error("interface", f"no route to {host or 'other hosts'}; address=HOST:PORT names another", here)
    variables = {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
    if not command:
        print("\n".join(f"export {key}={value}" for key, value in variables.items()), flush=True)
        return
    _replace_process(command, variables)


def _replace_process(command: Sequence[str], variables: dict[str, str]) -> NoReturn:
    shown = " ".join(f"{key}={value}" for key, value in variables.items())
    print_to_stderr(f"doctor: {shown}")
    os.environ.update(variables)
    try:
        os.execvp(command[0], list(command))
    except OSError as error:
        raise config_error("command", f"{command[0]}: {error.strerror}") from error
