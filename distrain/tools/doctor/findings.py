"""What is wrong, by what the ranks know and measured, and what to type about it."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from distrain.tools.doctor.facts import Facts
from distrain.tools.doctor.group import Reduction
from distrain.tools.doctor.interfaces import is_loopback
from distrain.tools.doctor.links import Pair

#: Seconds by which clocks may differ: rendezvous and logs of several hosts bear so much.
_SKEW = 1.0
#: Bytes per second below which a link is slow whatever the others are: 100 Mbit/s Ethernet carries more.
_SLOW = 10e6
#: A link is slow beside others that are so many times as fast, unless it carries a gigabit: above that, what Python can
#: send and what else its host does decide.
_BESIDE_OTHERS, _FAST = 4.0, 125e6
#: Of what was expected, this much must come through.
_OF_EXPECTED = 0.5
#: Packages whose difference breaks or changes a run; others are worth knowing.
_MUST_AGREE = ("torch", "distrain", "cuda", "nccl")


@dataclass(frozen=True)
class Finding:
    """Something that a user should know.

    Attributes:
        kind: A word for it, for scripts.
        problem: What is wrong and where, as a sentence.
        advice: What to type, or where to look.
        wrong: Whether a job would fail or crawl; otherwise it is merely worth knowing.
    """

    kind: str
    problem: str
    advice: str
    wrong: bool = True


@dataclass(frozen=True)
class Examination:
    """All that the ranks found out together.

    Attributes:
        size: How many ranks there should be.
        patience: Seconds that they had to arrive.
        facts: What each rank that came says, by rank.
        routes: Each rank's address on the way to the other hosts.
        pairs: What hosts measured between each other, in both directions of connecting.
        reductions: All-reduce by backend.
        expected: Bytes per second that each link should have; ``None`` for nothing to compare with.
        threads: ``runtime.threads`` of the job; ``None`` for distrain's own choice.
    """

    size: int
    patience: float
    facts: Mapping[int, Facts]
    routes: Mapping[int, str] = field(default_factory=dict)
    pairs: Sequence[Pair] = ()
    reductions: Sequence[Reduction] = ()
    expected: float | None = None
    threads: int | None = None

    @property
    def hosts(self) -> list[Facts]:
        """The first rank of each machine."""
        first: dict[str, Facts] = {}
        for facts in self.facts.values():
            first.setdefault(facts.machine, facts)
        return list(first.values())


def judge(found: Examination) -> list[Finding]:
    """All findings: what is wrong first, in the order in which it should be put right."""
    all_of_them = [
        *_missing(found),
        *_names(found),
        *_interfaces(found),
        *_ports(found),
        *_versions(found),
        *_clocks(found),
        *_slow_links(found),
        *_threads(found),
        *_gpus(found),
        *_groups(found),
    ]
    return sorted(all_of_them, key=lambda finding: not finding.wrong)


def _missing(found: Examination) -> Iterator[Finding]:
    for rank in range(found.size):
        if rank not in found.facts:
            yield Finding(
                "missing rank",
                f"rank {rank} never arrived within {found.patience:g} s",
                "look on its host whether the command was started there, with this rank, and what it says; "
                f"the others came from {', '.join(facts.host for facts in found.hosts)}",
            )


def _names(found: Examination) -> Iterator[Finding]:
    for facts in found.hosts:
        if not facts.own_name:
            address = found.routes.get(facts.rank) or facts.route
            advice = f"on {facts.host}: echo '{address} {facts.host}' >> /etc/hosts"
            if facts.interfaces:
                advice += f"; or {_export(found, facts)}"
            yield Finding(
                "host name",
                f"{facts.host} can't resolve its own name: gloo may hang or take the loopback, and torchrun's c10d "
                "rendezvous fails without --local-addr",
                advice,
                # Where the interface is named, gloo doesn't ask for the name.
                wrong=len(found.hosts) > 1 and not facts.named,
            )
    for name, count in Counter(facts.host for facts in found.hosts).items():
        if count > 1:
            yield Finding(
                "same name",
                f"{count} machines call themselves '{name}', so ranks can't tell them apart",
                "hostnamectl set-hostname NAME, a different one on each",
            )


def _interfaces(found: Examination) -> Iterator[Finding]:
    several = len(found.hosts) > 1
    for facts in found.facts.values():
        if not facts.address:
            yield Finding(
                "wrong interface",
                f"{facts.place} has no network to use: {facts.why}; there are {_listed(facts.interfaces)}",
                _export(found, facts),
            )
        elif several and is_loopback(facts.address):
            yield Finding(
                "wrong interface",
                f"{facts.place} would use {facts.interface or 'the loopback'} ({facts.address}), which no other host "
                f"can reach: {facts.why}",
                _export(found, facts),
            )
        elif several and _unreached(found, facts) and _reached(found, facts):
            yield Finding(
                "wrong interface",
                f"{facts.place} would use {facts.interface} ({facts.address}), which other hosts can't reach, "
                f"while they reach {found.routes[facts.rank]}: {facts.why}",
                _export(found, facts),
            )


def _unreached(found: Examination, facts: Facts) -> bool:
    """Whether another host failed at the address that gloo would use."""
    return any(pair.target == facts.rank and facts.address in pair.errors for pair in found.pairs)


def _reached(found: Examination, facts: Facts) -> bool:
    """Whether some address of the host answered all the same."""
    return any(pair.target == facts.rank and pair.latency is not None for pair in found.pairs)


def _ports(found: Examination) -> Iterator[Finding]:
    for pair in found.pairs:
        if pair.latency is None:
            source, target = found.facts[pair.source], found.facts[pair.target]
            tried = "; ".join(
                f"{address}: {error}" for address, error in pair.errors.items() if not is_loopback(address)
            )
            yield Finding(
                "closed port",
                f"{source.host} can't connect to {target.host} ({tried or 'it gave no address but the loopback'})",
                f"on {target.host}, let {source.host} in on all TCP ports from 1024 up: ranks listen where the system "
                f"chooses. For example: iptables -I INPUT -p tcp -s {found.routes.get(source.rank) or source.route} "
                "-j ACCEPT",
            )


def _versions(found: Examination) -> Iterator[Finding]:
    packages = sorted({name for facts in found.hosts for name in facts.versions}, key=lambda name: name != "torch")
    for package in packages:
        by_host = {facts.host: facts.versions.get(package, "none") for facts in found.hosts}
        usual, count = Counter(by_host.values()).most_common(1)[0]
        others = {host: version for host, version in by_host.items() if version != usual}
        if not others:
            continue
        told = ", ".join(f"{version} on {host}" for host, version in others.items())
        rest = "the others have" if count > 1 else f"{next(host for host in by_host if host not in others)} has"
        advice = "install the same everywhere"
        if package == "distrain":
            advice = "bring the code to the same state everywhere: git status; git rev-parse HEAD"
        elif package not in ("python", "cuda", "nccl", "gpu driver"):
            advice = f"on {', '.join(others)}: pip install '{package}=={usual}'"
        yield Finding(
            f"{package} version", f"{package} is {told}; {rest} {usual}", advice, wrong=package in _MUST_AGREE
        )


def _clocks(found: Examination) -> Iterator[Finding]:
    reference = min(found.facts, default=0)
    for pair in found.pairs:
        if pair.source == reference and pair.skew is not None and abs(pair.skew) > _SKEW + (pair.latency or 0) / 2:
            here, there = found.facts[pair.source].host, found.facts[pair.target].host
            side = "ahead of" if pair.skew > 0 else "behind"
            yield Finding(
                "clock skew",
                f"the clock of {there} is {abs(pair.skew):.1f} s {side} that of {here}: times in logs, and whether "
                "files are newer, can't be compared",
                f"on {there}: timedatectl set-ntp true (or chronyc makestep)",
            )


def _slow_links(found: Examination) -> Iterator[Finding]:
    """A host all of whose links in one direction are slow, else single links."""
    ways: dict[tuple[int, int], float] = {}
    for pair in found.pairs:
        if pair.sent is not None:
            ways[pair.source, pair.target] = pair.sent
        if pair.received is not None:
            ways[pair.target, pair.source] = pair.received
    if not ways:
        return
    limit = found.expected * _OF_EXPECTED if found.expected is not None else _SLOW
    limit = max(limit, min(statistics.median(ways.values()) / _BESIDE_OTHERS, _FAST))
    slow = {way for way, rate in ways.items() if rate < limit}
    than = f"the median link carries {mbits(statistics.median(ways.values()))}"
    advice = (
        "look at that host's port and cable (ethtool INTERFACE: Speed), and at who else uses them; where it can't be "
        "mended: compression=auto, or strategy=local_sgd"
    )
    if len(slow) == len(ways):
        mean = mbits(statistics.median(ways.values()))
        yield Finding(
            "slow link",
            f"all links are slow: {mean}" + (f", not {mbits(found.expected)}" if found.expected else ""),
            "is this the fast network? ip -br address lists the others. If it is: compression=auto, or "
            "strategy=local_sgd",
        )
        return
    for facts in found.hosts:
        for end, side in ((0, "from"), (1, "to")):
            own = {way for way in ways if way[end] == facts.rank}
            if len(own) > 1 and own <= slow:
                rate = statistics.median(ways[way] for way in own)
                yield Finding("slow link", f"everything {side} {facts.host} is slow: {mbits(rate)}; {than}", advice)
                slow -= own
    for source, target in sorted(slow):
        hosts = f"{found.facts[source].host} to {found.facts[target].host}"
        yield Finding("slow link", f"{hosts} is slow: {mbits(ways[source, target])}; {than}", advice)


def _threads(found: Examination) -> Iterator[Finding]:
    for facts in found.hosts:
        cores = facts.cores if facts.quota is None else min(facts.cores, max(1, round(facts.quota)))
        threads = found.threads or facts.threads or 1
        if facts.local_size > cores:
            yield Finding(
                "too many ranks",
                f"{facts.host} runs {facts.local_size} ranks on {cores} cores",
                f"torchrun --nproc-per-node {cores}",
                wrong=not facts.gpus,
            )
        elif facts.local_size * threads > cores:
            share = max(1, cores // facts.local_size)
            key = f"runtime.threads={share}" if found.threads else f"export OMP_NUM_THREADS={share}"
            yield Finding(
                "too many threads",
                f"{facts.host} has {cores} cores for {facts.local_size} rank(s) of {threads} threads each: they get in "
                "each other's way",
                f"{key} (or leave it out: distrain takes the cores' share)",
            )
        if facts.quota is not None and facts.quota < facts.cores:
            yield Finding(
                "cpu limit",
                f"{facts.host} shows {facts.cores} cores, but its container may use {facts.quota:g}",
                f"runtime.threads={max(1, int(facts.quota / facts.local_size))}, or raise the limit",
                wrong=False,
            )
        if facts.numa_nodes > 1:
            yield Finding(
                "numa",
                f"{facts.host} has {facts.numa_nodes} memory nodes; a rank that spans them waits for the far one",
                "one rank a node: numactl --cpunodebind=N --membind=N before the rank's command",
                wrong=False,
            )


def _gpus(found: Examination) -> Iterator[Finding]:
    if not any(facts.gpus for facts in found.hosts):
        return
    for facts in found.hosts:
        if len(facts.gpus) < facts.local_size:
            yield Finding(
                "too few gpus",
                f"{facts.host} runs {facts.local_size} rank(s), and torch sees {len(facts.gpus)} GPU(s)",
                f"torchrun --nproc-per-node {max(1, len(facts.gpus))}; nvidia-smi and CUDA_VISIBLE_DEVICES say which "
                "are there",
            )
        right = right_interface(facts, found.routes.get(facts.rank, ""))
        if len(found.hosts) > 1 and right and right not in facts.nccl_interfaces:
            yield Finding(
                "wrong interface",
                f"NCCL on {facts.host} would use {', '.join(facts.nccl_interfaces) or 'no interface'}; "
                f"{right} leads to the other hosts",
                _export(found, facts),
            )
        slow = [line for line in facts.gpu_links if line.endswith((": SYS", ": no peer access"))]
        if slow:
            yield Finding(
                "gpu links",
                f"on {facts.host}, {', '.join(slow)}: they talk through the processors",
                "CUDA_VISIBLE_DEVICES picks GPUs that are nearer; nvidia-smi topo -m shows which",
                wrong=False,
            )
    kinds = {name for facts in found.hosts for name in facts.gpus}
    if len(kinds) > 1:
        yield Finding(
            "mixed gpus", f"the GPUs differ: {', '.join(sorted(kinds))}", "the slowest sets the pace", wrong=False
        )


def _groups(found: Examination) -> Iterator[Finding]:
    for reduction in found.reductions:
        if reduction.error:
            yield Finding(
                "process group",
                f"{reduction.backend}: all-reduce over all ranks failed: {reduction.error}",
                "put right what stands above, if anything; else "
                + ("NCCL_DEBUG=INFO" if reduction.backend == "nccl" else "TORCH_DISTRIBUTED_DEBUG=DETAIL")
                + " in the environment says more",
            )


def right_interface(facts: Facts, route: str) -> str:
    """The interface by which a host reaches the others; empty where none has that address."""
    return next((name for name, address in facts.interfaces.items() if address == (route or facts.route)), "")


def _export(found: Examination, facts: Facts) -> str:
    name = right_interface(facts, found.routes.get(facts.rank, ""))
    if not name:
        return f"on {facts.host}: export GLOO_SOCKET_IFNAME=NAME, one of {_listed(facts.interfaces)}"
    also = f" NCCL_SOCKET_IFNAME={name}" if facts.gpus else ""
    return f"on {facts.host}: export GLOO_SOCKET_IFNAME={name}{also}"


def _listed(interfaces: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({address})" for name, address in interfaces.items()) or "no interfaces"


def mbits(rate: float | None) -> str:
    """Bytes per second as people say them."""
    if rate is None:
        return "-"
    bits = 8 * rate
    return f"{bits / 1e9:.3g} Gbit/s" if bits >= 1e9 else f"{bits / 1e6:.3g} Mbit/s"
