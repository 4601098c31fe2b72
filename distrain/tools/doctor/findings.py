"""Derives from what the ranks know and measured what is wrong, and what to type about it."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from distrain.tools.doctor.examination import Examination
from distrain.tools.doctor.facts import RankFacts
from distrain.tools.doctor.interfaces import is_loopback

#: Seconds by which clocks may differ without disturbing rendezvous or the reading of logs.
_MAX_SKEW = 1.0
#: Bytes per second below which a link always counts as slow: 100 Mbit/s Ethernet carries more.
_SLOW = 10e6
#: A link also counts as slow if the median link is this many times as fast, unless it carries a gigabit per second.
#: Above that, the measurement shows how busy the hosts are rather than what the link can carry.
_MEDIAN_RATIO, _FAST = 4.0, 125e6
#: Fraction of the expected bandwidth that a link must carry.
_MIN_OF_EXPECTED = 0.5
#: Packages whose differences break or change a run; differences of others are only notes.
_MUST_AGREE = ("torch", "distrain", "cuda", "nccl")


@dataclass(frozen=True)
class Finding:
    """Something that a user should know.

    Attributes:
        kind: Short name of the problem, for scripts.
        problem: What is wrong and where, as a sentence.
        advice: What to type or where to look.
        wrong: Whether a job would fail or be slow; otherwise the finding is only a note.
    """

    kind: str
    problem: str
    advice: str
    wrong: bool = True


def diagnose(examination: Examination) -> list[Finding]:
    """Returns all findings; problems come before notes, in the order in which they should be fixed."""
    findings = [
        *_missing(examination),
        *_names(examination),
        *_interfaces(examination),
        *_ports(examination),
        *_versions(examination),
        *_clocks(examination),
        *_slow_links(examination),
        *_rank_order(examination),
        *_threads(examination),
        *_gpus(examination),
        *_apple_gpus(examination),
        *_process_groups(examination),
    ]
    return sorted(findings, key=lambda finding: not finding.wrong)


def _missing(examination: Examination) -> Iterator[Finding]:
    for rank in range(examination.size):
        if rank not in examination.facts:
            yield Finding(
                "missing rank",
                f"rank {rank} never arrived within {examination.wait_seconds:g} s",
                "check on its host that the command was started with this rank, and read its output; "
                f"the other ranks are on {', '.join(facts.host for facts in examination.hosts)}",
            )


def _names(examination: Examination) -> Iterator[Finding]:
    for facts in examination.hosts:
        if not facts.own_name:
            address = examination.routes.get(facts.rank) or facts.route
            advice = f"on {facts.host}: echo '{address} {facts.host}' >> /etc/hosts"
            if facts.interfaces:
                advice += f"; or {_export_advice(examination, facts)}"
            yield Finding(
                "host name",
                f"{facts.host} can't resolve its own name: gloo may hang or take the loopback, and torchrun's c10d "
                "rendezvous fails without --local-addr",
                advice,
                # gloo doesn't look up the name where GLOO_SOCKET_IFNAME is set.
                wrong=len(examination.hosts) > 1 and not facts.named,
            )
    for name, count in Counter(facts.host for facts in examination.hosts).items():
        if count > 1:
            yield Finding(
                "same name",
                f"{count} machines call themselves '{name}', so ranks can't tell them apart",
                "hostnamectl set-hostname NAME, a different one on each",
            )


def _interfaces(examination: Examination) -> Iterator[Finding]:
    several = len(examination.hosts) > 1
    for facts in examination.facts.values():
        if not facts.address:
            yield Finding(
                "wrong interface",
                f"{facts.label} has no network interface to use: {facts.why}; the host has {_listed(facts.interfaces)}",
                _export_advice(examination, facts),
            )
        elif several and is_loopback(facts.address):
            yield Finding(
                "wrong interface",
                f"{facts.label} would use {facts.interface or 'the loopback'} ({facts.address}), which no other host "
                f"can reach: {facts.why}",
                _export_advice(examination, facts),
            )
        elif several and _unreached(examination, facts) and _reached(examination, facts):
            yield Finding(
                "wrong interface",
                f"{facts.label} would use {facts.interface} ({facts.address}), which other hosts can't reach, "
                f"while they reach {examination.routes[facts.rank]}: {facts.why}",
                _export_advice(examination, facts),
            )


def _unreached(examination: Examination, facts: RankFacts) -> bool:
    """Whether another host could not connect to the address that gloo would use."""
    return any(link.target == facts.rank and facts.address in link.errors for link in examination.links)


def _reached(examination: Examination, facts: RankFacts) -> bool:
    """Whether another host could connect to any address of this host."""
    return any(link.target == facts.rank and link.latency is not None for link in examination.links)


def _ports(examination: Examination) -> Iterator[Finding]:
    for link in examination.links:
        if link.latency is None:
            source, target = examination.facts[link.source], examination.facts[link.target]
            tried = "; ".join(
                f"{address}: {error}" for address, error in link.errors.items() if not is_loopback(address)
            )
            address = examination.routes.get(source.rank) or source.route
            yield Finding(
                "closed port",
                f"{source.host} can't connect to {target.host} ({tried or 'it has only a loopback address'})",
                f"on {target.host}, allow connections from {source.host} to all TCP ports from 1024 up, because ranks "
                "listen on ports that the system chooses. For example: "
                f"iptables -I INPUT -p tcp -s {address} -j ACCEPT",
            )


def _versions(examination: Examination) -> Iterator[Finding]:
    packages = sorted(
        {name for facts in examination.hosts for name in facts.versions}, key=lambda name: name != "torch"
    )
    for package in packages:
        by_host = {facts.host: facts.versions.get(package, "none") for facts in examination.hosts}
        usual, count = Counter(by_host.values()).most_common(1)[0]
        others = {host: version for host, version in by_host.items() if version != usual}
        if not others:
            continue
        different = ", ".join(f"{version} on {host}" for host, version in others.items())
        rest = "the others have" if count > 1 else f"{next(host for host in by_host if host not in others)} has"
        advice = "install the same version on all hosts"
        if package == "distrain":
            advice = "use the same code on all hosts (git status; git rev-parse HEAD)"
        elif package not in ("python", "cuda", "nccl", "gpu driver"):
            advice = f"on {', '.join(others)}: pip install '{package}=={usual}'"
        yield Finding(
            f"{package} version", f"{package} is {different}; {rest} {usual}", advice, wrong=package in _MUST_AGREE
        )


def _clocks(examination: Examination) -> Iterator[Finding]:
    reference = min(examination.facts, default=0)
    for link in examination.links:
        if link.source == reference and link.skew is not None and abs(link.skew) > _MAX_SKEW + (link.latency or 0) / 2:
            here, there = examination.facts[link.source].host, examination.facts[link.target].host
            side = "ahead of" if link.skew > 0 else "behind"
            yield Finding(
                "clock skew",
                f"the clock of {there} is {abs(link.skew):.1f} s {side} that of {here}: times in logs and of "
                "files can't be compared",
                f"on {there}: timedatectl set-ntp true (or chronyc makestep)",
            )


def _slow_links(examination: Examination) -> Iterator[Finding]:
    """Finds hosts whose links in one direction are all slow, and otherwise single slow links."""
    rates: dict[tuple[int, int], float] = {}
    for link in examination.links:
        if link.sent is not None:
            rates[link.source, link.target] = link.sent
        if link.received is not None:
            rates[link.target, link.source] = link.received
    if not rates:
        return
    limit = examination.expected * _MIN_OF_EXPECTED if examination.expected is not None else _SLOW
    limit = max(limit, min(statistics.median(rates.values()) / _MEDIAN_RATIO, _FAST))
    slow = {direction for direction, rate in rates.items() if rate < limit}
    than = f"the median link carries {format_rate(statistics.median(rates.values()))}"
    instead = _for_slow_links(examination)
    advice = (
        "look at that host's port and cable (ethtool INTERFACE: Speed), and at other traffic on it; if the link "
        f"can't be improved: {instead}"
    )
    if len(slow) == len(rates):
        mean = format_rate(statistics.median(rates.values()))
        yield Finding(
            "slow link",
            f"all links are slow: {mean}"
            + (f" (expected {format_rate(examination.expected)})" if examination.expected else ""),
            f"is this the host's fastest network? ip -br address lists all. If it is: {instead}",
        )
        return
    for facts in examination.hosts:
        for end, side in ((0, "from"), (1, "to")):
            own = {direction for direction in rates if direction[end] == facts.rank}
            if len(own) > 1 and own <= slow:
                rate = statistics.median(rates[direction] for direction in own)
                yield Finding(
                    "slow link", f"all traffic {side} {facts.host} is slow: {format_rate(rate)}; {than}", advice
                )
                slow -= own
    for source, target in sorted(slow):
        hosts = f"{examination.facts[source].host} to {examination.facts[target].host}"
        yield Finding("slow link", f"{hosts} is slow: {format_rate(rates[source, target])}; {than}", advice)


def _for_slow_links(examination: Examination) -> str:
    """What to type where links stay slow."""
    hosts, sizes = len(examination.hosts), {facts.local_size for facts in examination.hosts}
    ways = "compression=auto, or strategy=local_sgd"
    if len(sizes) == 1 and max(sizes) > 1:
        # With as many replicas as hosts, each is on a host.
        ways += (
            f"; if a model must be divided: strategy=mesh strategy.mesh.data={hosts} and all other dimensions within "
            "a host, so that the link carries gradients alone"
        )
    return ways


def _rank_order(examination: Examination) -> Iterator[Finding]:
    """Finds a host whose ranks are not neighbours; one is enough, since other hosts have the ranks in between."""
    machines = {rank: facts.machine for rank, facts in examination.facts.items()}
    for facts in examination.hosts:
        own = sorted(rank for rank, machine in machines.items() if machine == facts.machine)
        if any(machines.get(rank, facts.machine) != facts.machine for rank in range(own[0], own[-1])):
            yield Finding(
                "rank order",
                f"{facts.host} has ranks {', '.join(map(str, own))}, and other hosts have those between them: a mesh, "
                "a pipeline and strategy.shard_size take neighbours to be on one host, and would send most between "
                "hosts",
                "number the ranks host by host, as torchrun does; under SLURM srun --distribution=block",
                wrong=False,
            )
            return


def _threads(examination: Examination) -> Iterator[Finding]:
    for facts in examination.hosts:
        cores = facts.cores if facts.quota is None else min(facts.cores, max(1, round(facts.quota)))
        threads = examination.threads or facts.threads
        if facts.local_size > cores:
            yield Finding(
                "too many ranks",
                f"{facts.host} runs {facts.local_size} ranks on {cores} cores",
                f"torchrun --nproc-per-node {cores}",
                wrong=not facts.gpus,
            )
        elif facts.local_size * threads > cores:
            share = max(1, cores // facts.local_size)
            key = f"runtime.threads={share}" if examination.threads else f"export OMP_NUM_THREADS={share}"
            yield Finding(
                "too many threads",
                f"{facts.host} has {cores} cores for {facts.local_size} rank(s) of {threads} threads each: they "
                "compete for the cores",
                f"{key} (or unset it: distrain divides the cores among the ranks)",
            )
        elif facts.load > 1 and threads > 1:
            yield Finding(
                "busy machine",
                f"{facts.host} is busy: {facts.load:.1f} processes per processor run or wait. A rank has {threads} "
                "threads, which wait for each other: other work that delays one delays all",
                "runtime.threads=1 while other work runs",
                wrong=False,
            )
        if facts.quota is not None and facts.quota < facts.cores:
            yield Finding(
                "cpu limit",
                f"{facts.host} has {facts.cores} cores, but its container may use {facts.quota:g}",
                f"runtime.threads={max(1, int(facts.quota / facts.local_size))}, or raise the limit",
                wrong=False,
            )
        if facts.numa_nodes > 1:
            yield Finding(
                "numa",
                f"{facts.host} has {facts.numa_nodes} NUMA nodes; a rank that spans them waits for remote memory",
                "one rank per NUMA node: numactl --cpunodebind=N --membind=N before the rank's command",
                wrong=False,
            )


def _gpus(examination: Examination) -> Iterator[Finding]:
    if not any(facts.gpus for facts in examination.hosts):
        return
    for facts in examination.hosts:
        if len(facts.gpus) < facts.local_size:
            yield Finding(
                "too few gpus",
                f"{facts.host} runs {facts.local_size} rank(s), and torch sees {len(facts.gpus)} GPU(s)",
                f"torchrun --nproc-per-node {max(1, len(facts.gpus))}; nvidia-smi and CUDA_VISIBLE_DEVICES show which "
                "are available",
            )
        right = right_interface(facts, examination.routes.get(facts.rank, ""))
        if len(examination.hosts) > 1 and right and right not in facts.nccl_interfaces:
            yield Finding(
                "wrong interface",
                f"NCCL on {facts.host} would use {', '.join(facts.nccl_interfaces) or 'no interface'}; "
                f"{right} is the one that reaches the other hosts",
                _export_advice(examination, facts),
            )
        slow = [line for line in facts.gpu_links if line.endswith((": SYS", ": no peer access"))]
        if slow:
            yield Finding(
                "gpu links",
                f"on {facts.host}, {', '.join(slow)}: their traffic goes through the CPUs",
                "choose GPUs with a direct link by CUDA_VISIBLE_DEVICES; nvidia-smi topo -m lists the links",
                wrong=False,
            )
    kinds = {name for facts in examination.hosts for name in facts.gpus}
    if len(kinds) > 1:
        yield Finding(
            "mixed gpus",
            f"the GPUs differ: {', '.join(sorted(kinds))}",
            "each step takes as long as on the slowest GPU",
            wrong=False,
        )


def _apple_gpus(examination: Examination) -> Iterator[Finding]:
    for facts in examination.hosts:
        if facts.apple_gpu:
            yield Finding(
                "apple gpu",
                f"{facts.host} has an Apple GPU, which a training doesn't use unless it is told to",
                "runtime.device=mps trains on it, on one rank",
                wrong=False,
            )


def _process_groups(examination: Examination) -> Iterator[Finding]:
    for timing in examination.all_reduce:
        if timing.error:
            yield Finding(
                "process group",
                f"{timing.backend}: all-reduce over all ranks failed: {timing.error}",
                "first fix the problems above, if any; otherwise run with "
                + ("NCCL_DEBUG=INFO" if timing.backend == "nccl" else "TORCH_DISTRIBUTED_DEBUG=DETAIL")
                + " for details",
            )


def right_interface(facts: RankFacts, route: str) -> str:
    """Returns the interface through which a host reaches the others; empty if none has the address of that route."""
    return next((name for name, address in facts.interfaces.items() if address == (route or facts.route)), "")


def _export_advice(examination: Examination, facts: RankFacts) -> str:
    name = right_interface(facts, examination.routes.get(facts.rank, ""))
    if not name:
        return f"on {facts.host}: export GLOO_SOCKET_IFNAME=NAME, one of {_listed(facts.interfaces)}"
    also = f" NCCL_SOCKET_IFNAME={name}" if facts.gpus else ""
    return f"on {facts.host}: export GLOO_SOCKET_IFNAME={name}{also}"


def _listed(interfaces: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({address})" for name, address in interfaces.items()) or "no interfaces"


def format_rate(rate: float | None) -> str:
    """Formats bytes per second as Mbit/s or Gbit/s; ``-`` for ``None``."""
    if rate is None:
        return "-"
    bits = 8 * rate
    return f"{bits / 1e9:.3g} Gbit/s" if bits >= 1e9 else f"{bits / 1e6:.3g} Mbit/s"
