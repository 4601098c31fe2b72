"""``launch/doctor.py``: examines this machine, or with the other ranks' doctors all hosts of a job."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from distrain.cli import output
from distrain.config.schema import setting
from distrain.errors import ConfigError, Failed, missing
from distrain.runtime.world import World
from distrain.tools.doctor import facts as local
from distrain.tools.doctor import findings, interfaces, report
from distrain.tools.doctor.facts import Facts
from distrain.tools.doctor.findings import Examination, Finding
from distrain.tools.doctor.group import Reduction, time_all_reduce
from distrain.tools.doctor.links import Listener, Pair, measure, rounds
from distrain.tools.doctor.meeting import Meeting, NoMeeting

#: Seconds for a step that all ranks take together, the time to measure aside.
_PATIENCE = 15.0
_RATES = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


@dataclass
class DoctorSettings:
    """Keys of ``launch/doctor.py``."""

    address: str | None = setting("HOST:PORT where ranks meet; null: MASTER_ADDR and MASTER_PORT.")
    ranks: int | None = setting("How many there are; null: WORLD_SIZE.", at_least=1)
    rank: int | None = setting("This one, from 0; null: RANK.", at_least=0)
    wait: float = setting("Seconds that ranks have to arrive.", above=0)
    expect: str | None = setting("What each link should carry, like 1gbit; null: nothing to compare with.")
    threads: int | None = setting("runtime.threads of the job; null: not set.", at_least=1)
    output: str | None = setting("File for the findings and all that was measured (JSON), by rank 0; null: none.")
    export: bool = setting("Only print the lines that set the right interface on this host, for a shell's eval.")


def run(settings: DoctorSettings, command: Sequence[str]) -> list[Finding]:
    """Examines and prints.

    Args:
        settings: The command line before ``--``.
        command: What stands behind it: run in place of this process with the right interface set.

    Returns:
        The findings, on rank 0; those about this rank alone where ranks could not meet.

    Raises:
        ConfigError: A setting can't be used.
        Failed: Something is wrong, as was printed.
    """
    world, host, port = _place(settings)
    expected = _rate("expect", settings.expect)
    target = Path(settings.output).expanduser() if settings.output is not None else None
    if target is not None and world.rank == 0:
        output.check(target)
    if settings.export or command:
        _set(host, command)
        return []
    mine = local.gather(world, host)
    broken: list[Finding] = []
    alone = Examination(1, settings.wait, {world.rank: mine}, expected=expected, threads=settings.threads)
    if world.size == 1:
        found = alone
    else:
        try:
            found = _together(world, host, port, mine, alone, settings.wait)
        except NoMeeting as error:
            # What this rank sees by itself may be the reason.
            found = dataclasses.replace(alone, size=0)
            broken.append(Finding(error.kind, f"{mine.place}: {error.problem}", error.advice))
    judged = [*broken, *findings.judge(found)]
    if world.rank == 0:
        print(report.text(found, judged), end="", flush=True)
        if target is not None:
            output.write_text(target, json.dumps(report.as_json(found, judged), indent=2) + "\n")
    elif broken:
        print(f"{mine.place}\n{report.advice(judged)}", flush=True)
    if any(finding.wrong for finding in judged):
        raise Failed
    return judged


def _place(settings: DoctorSettings) -> tuple[World, str, int]:
    """This rank among all, and where they meet."""
    world = World.from_environment()
    if settings.ranks is not None or settings.rank is not None:
        size = settings.ranks or world.size
        rank = world.rank if settings.rank is None else settings.rank
        # Typed by hand, a rank is the only one of its host unless a launcher says otherwise.
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
        raise missing("address", f"{world.size} ranks need HOST:PORT of rank 0's host, where they meet")
    return world, host.strip("[]"), int(port) if port.isdigit() else 0


def _rate(key: str, text: str | None) -> float | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+\.?\d*)(kbit|mbit|gbit)", text)
    if found is None:
        raise ConfigError(key, text, "must be a rate like 100mbit or 1gbit")
    return float(found[1]) * _RATES[found[2]] / 8


def _set(host: str, command: Sequence[str]) -> None:
    """Prints, or sets for a command, the interface by which this host reaches the meeting place, or goes out."""
    here = interfaces.addresses()
    met = interfaces.resolve(host).address if host else ""
    if host and not met:
        raise ConfigError("address", host, "doesn't resolve; give an address")
    own = interfaces.towards(met) if met else interfaces.towards()
    if interfaces.is_loopback(own) or not own:
        # Ranks meet on this very host, under a name that leads to its loopback.
        outside = [address for address in here.values() if not interfaces.is_loopback(address)]
        own = outside[0] if len(outside) == 1 else interfaces.towards()
    name = interfaces.interface_of(own, here)
    if not name:
        raise missing("interface", f"no way leads to {host or 'other hosts'}; address=HOST:PORT names another", here)
    variables = {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
    if not command:
        print("\n".join(f"export {key}={value}" for key, value in variables.items()), flush=True)
        return
    _become(command, variables)


def _become(command: Sequence[str], variables: dict[str, str]) -> NoReturn:
    shown = " ".join(f"{key}={value}" for key, value in variables.items())
    print(f"doctor: {shown}", file=sys.stderr, flush=True)
    os.environ.update(variables)
    try:
        os.execvp(command[0], list(command))
    except OSError as error:
        raise missing("command", f"{command[0]}: {error.strerror}") from error


def _together(world: World, host: str, port: int, mine: Facts, alone: Examination, wait: float) -> Examination:
    """What all ranks find out together; the whole of it on rank 0."""
    meeting = Meeting(world, host, port, wait)
    # For one listener a host.
    listener = Listener() if world.local_rank == 0 else None
    door = [listener.port, listener.token] if listener is not None else None
    told = meeting.gather({"facts": dataclasses.asdict(mine), "door": door})
    facts = {rank: Facts(**each["facts"]) for rank, each in told.items()}
    routes = {
        rank: str(route) for rank, route in meeting.share("route", _route(mine, facts), _PATIENCE).items() if route
    }
    found = dataclasses.replace(alone, size=world.size, facts=facts, routes=routes)
    doors = {rank: (int(each["door"][0]), str(each["door"][1])) for rank, each in told.items() if each["door"]}
    pairs = _measure_pairs(meeting, world.rank, found, doors)
    found = dataclasses.replace(found, pairs=pairs)
    # Equal on all ranks, since all know the same.
    found = dataclasses.replace(found, reductions=_reduce(meeting, world, found))
    meeting.leave(_PATIENCE)
    if listener is not None:
        listener.close()
    return found


def _route(mine: Facts, facts: dict[int, Facts]) -> str:
    """This rank's address on the way to another machine; empty where there is no other, or no way."""
    others = [each for each in facts.values() if each.machine != mine.machine]
    for other in others:
        if other.route and not interfaces.is_loopback(other.route):
            return interfaces.towards(other.route)
    # All that others know of themselves leads to themselves.
    return interfaces.towards() if others else ""


def _measure_pairs(
    meeting: Meeting, rank: int, found: Examination, doors: dict[int, tuple[int, str]]
) -> Sequence[Pair]:
    """Each pair of hosts in turn, one partner at a time; known to all ranks in the end."""
    hosts = sorted(facts.rank for facts in found.hosts if facts.rank in doors)
    if len(hosts) < 2:
        return []
    mine: list[Pair] = []

    def towards(target: int, *, flow: bool) -> None:
        addresses = [found.facts[target].address, found.routes.get(target, "")]
        # From another machine it would lead back to this one.
        outside = [address for address in addresses if not interfaces.is_loopback(address)]
        mine.append(measure(rank, target, outside, *doors[target], flow=flow))

    for number, games in enumerate(rounds(hosts)):
        for first, second in games:
            if rank == first:
                towards(second, flow=True)
        meeting.share(f"round {number}", True, _PATIENCE)
        for first, second in games:
            if rank == second:
                towards(first, flow=False)
    told = meeting.share("pairs", [dataclasses.asdict(pair) for pair in mine], _PATIENCE)
    return [Pair(**pair) for pairs in told.values() for pair in pairs]


def _reduce(meeting: Meeting, world: World, found: Examination) -> list[Reduction]:
    """All-reduce, if there is a chance that it works."""
    hopeless = {"missing rank", "wrong interface", "closed port"}
    if any(finding.kind in hopeless for finding in findings.judge(found)):
        return []
    backends = ["gloo"]
    if all("nccl" in facts.backends and len(facts.gpus) >= facts.local_size for facts in found.facts.values()):
        backends.append("nccl")
    reductions = []
    for backend in backends:
        reductions.append(time_all_reduce(backend, world, meeting.store, 2 * _PATIENCE))
        if reductions[-1].error:
            break
    return reductions
