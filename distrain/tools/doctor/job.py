"""Examines all ranks of a job together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from distrain.runtime.world import World
from distrain.tools.doctor import interfaces
from distrain.tools.doctor.all_reduce import AllReduceTiming, time_all_reduce
from distrain.tools.doctor.examination import Examination
from distrain.tools.doctor.facts import RankFacts
from distrain.tools.doctor.findings import diagnose
from distrain.tools.doctor.links import LinkMeasurement, LinkServer, measure_host_link, pairing_rounds
from distrain.tools.doctor.rendezvous import DoctorRendezvous

#: Seconds for a step that all ranks take together, besides the time that measuring takes.
_STEP_SECONDS = 15.0


def examine_job(world: World, host: str, port: int, own: RankFacts, alone: Examination) -> Examination:
    """Examines the job's ranks, which must all call this together.

    Args:
        world: This rank's place among all ranks.
        host: Name or address of the host where ranks meet.
        port: Port on that host.
        own: Facts about this rank.
        alone: What this rank found out by itself, with the limits to compare with.

    Returns:
        What all ranks found out; complete on rank 0.

    Raises:
        RendezvousFailed: This rank could not meet the others.
    """
    rendezvous = DoctorRendezvous(world, host, port, alone.wait_seconds)
    # One server per host.
    server = LinkServer() if world.local_rank == 0 else None
    own_server = [server.port, server.token] if server is not None else None
    arrived = rendezvous.gather({"facts": dataclasses.asdict(own), "server": own_server})
    facts = {rank: RankFacts(**value["facts"]) for rank, value in arrived.items()}
    servers = {
        rank: (int(value["server"][0]), str(value["server"][1])) for rank, value in arrived.items() if value["server"]
    }
    routes = rendezvous.all_gather("route", _route_to_other_machines(own, facts), _STEP_SECONDS)
    examination = dataclasses.replace(
        alone, size=world.size, facts=facts, routes={rank: str(route) for rank, route in routes.items() if route}
    )
    examination = dataclasses.replace(examination, links=_measure_links(rendezvous, world.rank, examination, servers))
    # All ranks agree on whether to do this, because it depends only on what all of them know.
    examination = dataclasses.replace(examination, all_reduce=_time_all_reduce(rendezvous, world, examination))
    rendezvous.leave(_STEP_SECONDS)
    if server is not None:
        server.close()
    return examination


def _route_to_other_machines(own: RankFacts, facts: dict[int, RankFacts]) -> str:
    """Returns this rank's address on the route to another machine; empty without another machine or a route."""
    others = [other for other in facts.values() if other.machine != own.machine]
    for other in others:
        if other.route and not interfaces.is_loopback(other.route):
            return interfaces.source_address(other.route)
    # The others know only loopback addresses of themselves.
    return interfaces.source_address() if others else ""


def _measure_links(
    rendezvous: DoctorRendezvous, rank: int, examination: Examination, servers: dict[int, tuple[int, str]]
) -> Sequence[LinkMeasurement]:
    """Measures each pair of hosts, with at most one partner per host at a time; returns the same on all ranks."""
    hosts = sorted(facts.rank for facts in examination.hosts if facts.rank in servers)
    if len(hosts) < 2:
        return []
    own: list[LinkMeasurement] = []

    def measure(target: int, *, bandwidth: bool) -> None:
        candidates = [examination.facts[target].address, examination.routes.get(target, "")]
        # Another machine's loopback address would lead back to this machine.
        addresses = [address for address in candidates if not interfaces.is_loopback(address)]
        own.append(measure_host_link(rank, target, addresses, *servers[target], bandwidth=bandwidth))

    for number, pairs in enumerate(pairing_rounds(hosts)):
        for first, second in pairs:
            if rank == first:
                measure(second, bandwidth=True)
        # Acts as a barrier.
        rendezvous.all_gather(f"round {number}", True, _STEP_SECONDS)
        for first, second in pairs:
            if rank == second:
                measure(first, bandwidth=False)
    by_rank = rendezvous.all_gather("pairs", [dataclasses.asdict(link) for link in own], _STEP_SECONDS)
    return [LinkMeasurement(**link) for links in by_rank.values() for link in links]


def _time_all_reduce(rendezvous: DoctorRendezvous, world: World, examination: Examination) -> list[AllReduceTiming]:
    """Times all-reduce by each usable backend, unless an earlier finding makes it impossible."""
    fatal = {"missing rank", "wrong interface", "closed port"}
    if any(finding.kind in fatal for finding in diagnose(examination)):
        return []
    backends = ["gloo"]
    if all("nccl" in facts.backends and len(facts.gpus) >= facts.local_size for facts in examination.facts.values()):
        backends.append("nccl")
    timings = []
    for backend in backends:
        timings.append(time_all_reduce(backend, world, rendezvous.store, 2 * _STEP_SECONDS))
        if timings[-1].error:
            break
    return timings
