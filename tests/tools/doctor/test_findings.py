"""Which findings follow from one fault in an otherwise healthy job."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from distrain.tools.doctor import findings, report
from distrain.tools.doctor.all_reduce import AllReduceTiming
from distrain.tools.doctor.examination import Examination
from distrain.tools.doctor.facts import RankFacts
from distrain.tools.doctor.findings import diagnose
from distrain.tools.doctor.links import LinkMeasurement

GIGABIT = 117e6


def rank(number: int, **changes: Any) -> RankFacts:
    """Facts about a rank on its own host, without a fault."""
    address = f"10.0.0.{number + 1}"
    healthy = RankFacts(
        rank=number,
        host=f"node{number}",
        machine=f"machine{number}",
        local_rank=0,
        local_size=1,
        versions={"python": "3.11.2", "torch": "2.13.0", "distrain": "0.1.0 (12345678)"},
        interface="eth0",
        address=address,
        why=f"its own name 'node{number}' resolves to {address}",
        named=False,
        nccl_interfaces=["eth0"],
        interfaces={"lo": "127.0.0.1", "eth0": address},
        route=address,
        own_name=address,
        cores=4,
        quota=None,
        numa_nodes=1,
        threads=1,
        gpus=[],
        gpu_links=[],
        backends=["gloo"],
    )
    return dataclasses.replace(healthy, **changes)


def job(*ranks: RankFacts, **changes: Any) -> Examination:
    """Results of a job whose ranks measured a fast network."""
    facts = {own.rank: own for own in ranks}
    links = [
        LinkMeasurement(a, b, {}, 1e-4, GIGABIT if a < b else None, GIGABIT if a < b else None, 0.0)
        for a in facts
        for b in facts
        if a != b
    ]
    healthy = Examination(len(facts), 30, facts, {number: own.route for number, own in facts.items()}, links)
    return dataclasses.replace(healthy, **changes)


def changed(examination: Examination, source: int, target: int, **changes: Any) -> Examination:
    """Returns the examination with the measurement of one link changed."""
    links = [
        dataclasses.replace(link, **changes) if (link.source, link.target) == (source, target) else link
        for link in examination.links
    ]
    return dataclasses.replace(examination, links=links)


def only(examination: Examination) -> findings.Finding:
    """Returns the one finding, and fails if there are more or none."""
    (finding,) = diagnose(examination)
    return finding


def test_healthy_job_has_no_findings() -> None:
    examination = job(rank(0), rank(1), rank(2))
    assert diagnose(examination) == []
    assert report.format_report(examination, []).endswith("no problem found\n")


def test_different_torch_version_is_reported_with_its_host() -> None:
    other = rank(1, versions={**rank(1).versions, "torch": "2.6.0"})
    finding = only(job(rank(0), other, rank(2)))
    assert finding.wrong
    assert finding.problem == "torch is 2.6.0 on node1; the others have 2.13.0"
    assert finding.advice == "on node1: pip install 'torch==2.13.0'"


def test_different_code_is_a_problem_and_different_numpy_a_note() -> None:
    finding = only(job(rank(0), rank(1, versions={**rank(1).versions, "distrain": "0.1.0 (abcdef01)"})))
    assert (finding.kind, finding.wrong) == ("distrain version", True)
    assert "git" in finding.advice
    finding = only(job(rank(0), rank(1, versions={**rank(1).versions, "numpy": "1.26"})))
    assert (finding.kind, finding.wrong) == ("numpy version", False)


def test_an_apple_gpu_is_noted_since_nothing_uses_it_unasked() -> None:
    finding = only(job(rank(0, apple_gpu=True)))
    assert not finding.wrong
    assert finding.advice == "runtime.device=mps trains on it, on one rank"


def test_loopback_is_a_problem_only_among_several_hosts() -> None:
    lo = {"interface": "lo", "address": "127.0.0.1", "why": "GLOO_SOCKET_IFNAME=lo"}
    finding = only(job(rank(0), rank(1, **lo)))
    assert finding.kind == "wrong interface"
    assert finding.problem == (
        "rank 1 on node1 would use lo (127.0.0.1), which no other host can reach: GLOO_SOCKET_IFNAME=lo"
    )
    assert finding.advice == "on node1: export GLOO_SOCKET_IFNAME=eth0"
    assert diagnose(job(rank(0, **lo))) == []


def test_missing_interface_is_reported_with_the_existing_ones() -> None:
    gone = {"interface": "ib0", "address": "", "why": "GLOO_SOCKET_IFNAME=ib0 names no interface with an address here"}
    finding = only(job(rank(0), rank(1, **gone)))
    assert "lo (127.0.0.1), eth0 (10.0.0.2)" in finding.problem
    assert finding.advice.endswith("export GLOO_SOCKET_IFNAME=eth0")


def test_unreachable_interface_is_reported_if_another_is_reachable() -> None:
    docker = {"interface": "docker0", "address": "172.17.0.1"}
    docker["interfaces"] = {"docker0": "172.17.0.1", "eth0": "10.0.0.2"}  # type: ignore[assignment]
    examination = changed(job(rank(0), rank(1, **docker)), 0, 1, errors={"172.17.0.1": "no answer"})
    finding = only(examination)
    assert "docker0 (172.17.0.1), which other hosts can't reach, while they reach 10.0.0.2" in finding.problem
    assert finding.advice == "on node1: export GLOO_SOCKET_IFNAME=eth0"


def test_advice_sets_nccls_interface_on_hosts_with_gpus() -> None:
    lo = {"interface": "lo", "address": "127.0.0.1", "gpus": ["H100"]}
    finding = next(one for one in diagnose(job(rank(0, gpus=["H100"]), rank(1, **lo))) if one.kind == "wrong interface")
    assert finding.advice == "on node1: export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0"


def test_failed_connection_is_reported_with_both_hosts_and_the_reason() -> None:
    examination = job(rank(0), rank(1))
    closed = changed(examination, 1, 0, errors={"10.0.0.1": "no answer: a firewall drops packets"}, latency=None)
    finding = only(closed)
    assert finding.kind == "closed port"
    assert finding.problem.startswith("node1 can't connect to node0 (10.0.0.1: no answer")
    assert "iptables -I INPUT -p tcp -s 10.0.0.2 -j ACCEPT" in finding.advice


def test_unresolvable_own_name_is_reported() -> None:
    why = "its own name 'node1' doesn't resolve (unknown), so gloo takes the loopback"
    unresolved = rank(1, own_name="", interface="lo", address="127.0.0.1", why=why)
    kinds = {finding.kind: finding for finding in diagnose(job(rank(0), unresolved))}
    assert set(kinds) == {"host name", "wrong interface"}
    assert "echo '10.0.0.2 node1' >> /etc/hosts" in kinds["host name"].advice
    # gloo doesn't look up the name where GLOO_SOCKET_IFNAME is set.
    named = only(job(rank(0), rank(1, own_name="", named=True)))
    assert (named.kind, named.wrong) == ("host name", False)


def test_two_machines_with_the_same_name_are_reported() -> None:
    finding = only(job(rank(0, host="localhost"), rank(1, host="localhost")))
    assert finding.problem == "2 machines call themselves 'localhost', so ranks can't tell them apart"


def test_slow_host_is_distinguished_from_a_slow_link() -> None:
    examination = job(*(rank(number) for number in range(4)))
    link = changed(examination, 1, 2, sent=GIGABIT / 10)
    assert only(link).problem.startswith("node1 to node2 is slow: 93.6 Mbit/s; the median link carries 936 Mbit/s")
    for target in range(3):
        # From the last host to each of the others.
        examination = changed(examination, target, 3, received=1e6)
    assert only(examination).problem.startswith("all traffic from node3 is slow: 8 Mbit/s")


def test_network_whose_links_are_all_slow_is_reported_once() -> None:
    two = changed(job(rank(0), rank(1)), 0, 1, sent=5e6, received=5e6)
    assert only(two).problem == "all links are slow: 40 Mbit/s"
    hundred = changed(job(rank(0), rank(1)), 0, 1, sent=11.8e6, received=11.8e6)
    assert diagnose(hundred) == []
    finding = only(dataclasses.replace(hundred, expected=125e6))
    assert finding.problem == "all links are slow: 94.4 Mbit/s (expected 1 Gbit/s)"
    assert "strategy=mesh" not in finding.advice


def placed(*hosts: int) -> Examination:
    """A job with two ranks on each of two hosts, by the host of each rank."""
    ranks = [
        rank(number, host=f"node{host}", machine=f"machine{host}", local_rank=hosts[:number].count(host), local_size=2)
        for number, host in enumerate(hosts)
    ]
    return job(*ranks)


def test_a_mesh_is_advised_that_sends_gradients_alone_over_a_slow_link() -> None:
    examination = placed(0, 0, 1, 1)
    links = [dataclasses.replace(link, sent=5e6, received=5e6) for link in examination.links if link.source == 0]
    assert "strategy=mesh strategy.mesh.data=2 and all" in only(dataclasses.replace(examination, links=links)).advice


def test_ranks_that_are_not_numbered_host_by_host_are_noted() -> None:
    assert diagnose(placed(0, 0, 1, 1)) == []
    finding = only(placed(0, 1, 0, 1))
    assert (finding.kind, finding.wrong) == ("rank order", False)
    assert finding.problem.startswith("node0 has ranks 0, 2, and other hosts have those between them")
    assert "srun --distribution=block" in finding.advice


def test_clock_difference_beyond_the_measurements_accuracy_is_reported() -> None:
    examination = job(rank(0), rank(1))
    finding = only(changed(examination, 0, 1, skew=-90.0))
    assert finding.problem.startswith("the clock of node1 is 90.0 s behind that of node0")
    assert diagnose(changed(examination, 0, 1, skew=1.5, latency=2.0)) == []


def test_more_threads_or_ranks_than_cores_are_reported() -> None:
    crowded = rank(0, threads=8, local_size=2)
    finding = only(job(crowded))
    assert finding.problem.startswith("node0 has 4 cores for 2 rank(s) of 8 threads each")
    assert finding.advice.startswith("export OMP_NUM_THREADS=2")
    assert only(job(rank(0), threads=5)).advice.startswith("runtime.threads=4")
    assert only(job(rank(0, local_size=5))).kind == "too many ranks"


def test_busy_machine_is_noted_if_a_rank_has_several_threads() -> None:
    finding = only(job(rank(0, threads=2, load=1.5)))
    assert (finding.kind, finding.wrong) == ("busy machine", False)
    assert finding.problem.startswith("node0 is busy: 1.5 processes per processor run or wait. A rank has 2 threads")
    assert finding.advice.startswith("runtime.threads=1")
    assert diagnose(job(rank(0, threads=1, load=1.5))) == []
    assert diagnose(job(rank(0, threads=2, load=0.9))) == []


def test_cpu_limit_of_a_container_is_reported() -> None:
    finding = only(job(rank(0, quota=1.5)))
    assert (finding.kind, finding.wrong) == ("cpu limit", False)


def test_rank_that_did_not_arrive_is_reported() -> None:
    finding = only(job(rank(0), rank(2), size=3))
    assert finding.problem == "rank 1 never arrived within 30 s"
    assert "rank  host           interface" in report.format_report(job(rank(0), rank(2), size=3), [finding])


def test_missing_and_distant_gpus_are_reported() -> None:
    results = diagnose(job(rank(0, local_size=2, gpus=["A"]), rank(1, gpus=["A", "B"], gpu_links=["GPU0 - GPU1: SYS"])))
    assert [(finding.kind, finding.wrong) for finding in results] == [
        ("too few gpus", True),
        ("gpu links", False),
        ("mixed gpus", False),
    ]


def test_wrong_interface_of_nccl_is_reported() -> None:
    finding = only(job(rank(0, gpus=["A"]), rank(1, gpus=["A"], nccl_interfaces=["ib0"])))
    assert finding.problem == "NCCL on node1 would use ib0; eth0 is the one that reaches the other hosts"
    assert finding.advice == "on node1: export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0"


def test_process_group_that_does_not_form_is_reported() -> None:
    finding = only(job(rank(0), rank(1), all_reduce=[AllReduceTiming("gloo", "no answer within 30 s")]))
    assert finding.problem == "gloo: all-reduce over all ranks failed: no answer within 30 s"


def test_all_reduce_is_named_by_what_carries_it() -> None:
    timings = [AllReduceTiming("gloo", "", [(1000, 0.001)], "shared memory"), AllReduceTiming("nccl", "", [(8, 0.1)])]
    shown = report.format_report(job(rank(0), rank(1), all_reduce=timings), [])
    assert "all-reduce (shared memory)  time" in shown
    assert "all-reduce (nccl)  time" in shown


@pytest.mark.parametrize(("rate", "expected"), [(1.25e9, "10 Gbit/s"), (GIGABIT, "936 Mbit/s"), (1e4, "0.08 Mbit/s")])
def test_rates_are_shown_in_bits_per_second(rate: float, expected: str) -> None:
    assert findings.format_rate(rate) == expected


def test_problems_come_before_notes_and_are_counted() -> None:
    results = diagnose(job(rank(0, quota=2.0), rank(1, versions={**rank(1).versions, "torch": "2.6.0"})))
    assert [finding.wrong for finding in results] == [True, False]
    text = report.format_findings(results)
    assert text.startswith("WRONG  torch is")
    assert text.endswith("1 problem found")
