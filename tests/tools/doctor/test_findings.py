"""From what ranks know to what is wrong: one fault at a time in an otherwise healthy job."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from distrain.tools.doctor import findings, report
from distrain.tools.doctor.facts import Facts
from distrain.tools.doctor.findings import Examination, judge
from distrain.tools.doctor.group import Reduction
from distrain.tools.doctor.links import Pair

GIGABIT = 117e6


def rank(number: int, **changes: Any) -> Facts:
    """A rank on a host of its own, without a fault."""
    address = f"10.0.0.{number + 1}"
    sound = Facts(
        rank=number,
        host=f"node{number}",
        machine=f"machine{number}",
        local_rank=0,
        local_size=1,
        versions={"python": "3.11.2", "torch": "2.13.0", "distrain": "0.1.0 (12345678)"},
        interface="eth0",
        address=address,
        why=f"its own name 'node{number}' leads to {address}",
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
    return dataclasses.replace(sound, **changes)


def job(*ranks: Facts, **changes: Any) -> Examination:
    """Ranks that measured a fast network."""
    facts = {each.rank: each for each in ranks}
    pairs = [
        Pair(a, b, {}, 1e-4, GIGABIT if a < b else None, GIGABIT if a < b else None, 0.0)
        for a in facts
        for b in facts
        if a != b
    ]
    sound = Examination(len(facts), 30, facts, {number: each.route for number, each in facts.items()}, pairs)
    return dataclasses.replace(sound, **changes)


def changed(found: Examination, source: int, target: int, **changes: Any) -> Examination:
    """With one pair's measurement changed."""
    pairs = [
        dataclasses.replace(pair, **changes) if (pair.source, pair.target) == (source, target) else pair
        for pair in found.pairs
    ]
    return dataclasses.replace(found, pairs=pairs)


def only(found: Examination) -> findings.Finding:
    """The one finding."""
    (finding,) = judge(found)
    return finding


def test_healthy_job_has_no_findings() -> None:
    found = job(rank(0), rank(1), rank(2))
    assert judge(found) == []
    assert report.text(found, []).endswith("nothing is wrong\n")


def test_another_torch_is_named_with_its_host() -> None:
    other = rank(1, versions={**rank(1).versions, "torch": "2.6.0"})
    finding = only(job(rank(0), other, rank(2)))
    assert finding.wrong
    assert finding.problem == "torch is 2.6.0 on node1; the others have 2.13.0"
    assert finding.advice == "on node1: pip install 'torch==2.13.0'"


def test_other_code_is_wrong_and_another_numpy_worth_knowing() -> None:
    finding = only(job(rank(0), rank(1, versions={**rank(1).versions, "distrain": "0.1.0 (abcdef01)"})))
    assert (finding.kind, finding.wrong) == ("distrain version", True)
    assert "git" in finding.advice
    finding = only(job(rank(0), rank(1, versions={**rank(1).versions, "numpy": "1.26"})))
    assert (finding.kind, finding.wrong) == ("numpy version", False)


def test_loopback_is_wrong_only_among_several_hosts() -> None:
    lo = {"interface": "lo", "address": "127.0.0.1", "why": "GLOO_SOCKET_IFNAME=lo"}
    finding = only(job(rank(0), rank(1, **lo)))
    assert finding.kind == "wrong interface"
    assert finding.problem == (
        "rank 1 on node1 would use lo (127.0.0.1), which no other host can reach: GLOO_SOCKET_IFNAME=lo"
    )
    assert finding.advice == "on node1: export GLOO_SOCKET_IFNAME=eth0"
    assert judge(job(rank(0, **lo))) == []


def test_interface_that_is_not_there_is_named_with_those_that_are() -> None:
    gone = {"interface": "ib0", "address": "", "why": "GLOO_SOCKET_IFNAME=ib0 names no interface with an address here"}
    finding = only(job(rank(0), rank(1, **gone)))
    assert "lo (127.0.0.1), eth0 (10.0.0.2)" in finding.problem
    assert finding.advice.endswith("export GLOO_SOCKET_IFNAME=eth0")


def test_interface_that_others_cannot_reach_while_another_answers() -> None:
    docker = {"interface": "docker0", "address": "172.17.0.1"}
    docker["interfaces"] = {"docker0": "172.17.0.1", "eth0": "10.0.0.2"}  # type: ignore[assignment]
    found = changed(job(rank(0), rank(1, **docker)), 0, 1, errors={"172.17.0.1": "no answer"})
    finding = only(found)
    assert "docker0 (172.17.0.1), which other hosts can't reach, while they reach 10.0.0.2" in finding.problem
    assert finding.advice == "on node1: export GLOO_SOCKET_IFNAME=eth0"


def test_gpus_need_nccl_told_too() -> None:
    lo = {"interface": "lo", "address": "127.0.0.1", "gpus": ["H100"]}
    finding = next(each for each in judge(job(rank(0, gpus=["H100"]), rank(1, **lo))) if each.kind == "wrong interface")
    assert finding.advice == "on node1: export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0"


def test_pair_that_cannot_connect_names_both_hosts_and_the_reason() -> None:
    found = job(rank(0), rank(1))
    shut = changed(found, 1, 0, errors={"10.0.0.1": "no answer: a firewall drops packets"}, latency=None)
    finding = only(shut)
    assert finding.kind == "closed port"
    assert finding.problem.startswith("node1 can't connect to node0 (10.0.0.1: no answer")
    assert "iptables -I INPUT -p tcp -s 10.0.0.2 -j ACCEPT" in finding.advice


def test_own_name_that_does_not_resolve() -> None:
    why = "its own name 'node1' doesn't resolve (unknown), so gloo takes the loopback"
    lost = rank(1, own_name="", interface="lo", address="127.0.0.1", why=why)
    kinds = {finding.kind: finding for finding in judge(job(rank(0), lost))}
    assert set(kinds) == {"host name", "wrong interface"}
    assert "echo '10.0.0.2 node1' >> /etc/hosts" in kinds["host name"].advice
    # With an interface named, the name isn't asked for.
    named = only(job(rank(0), rank(1, own_name="", named=True)))
    assert (named.kind, named.wrong) == ("host name", False)


def test_two_machines_of_one_name() -> None:
    finding = only(job(rank(0, host="localhost"), rank(1, host="localhost")))
    assert finding.problem == "2 machines call themselves 'localhost', so ranks can't tell them apart"


def test_slow_host_is_told_from_a_slow_link() -> None:
    found = job(*(rank(number) for number in range(4)))
    link = changed(found, 1, 2, sent=GIGABIT / 10)
    assert only(link).problem.startswith("node1 to node2 is slow: 93.6 Mbit/s; the median link carries 936 Mbit/s")
    for target in range(3):
        # The last host's way back to each of the others.
        found = changed(found, target, 3, received=1e6)
    assert only(found).problem.startswith("everything from node3 is slow: 8 Mbit/s")


def test_network_that_is_slow_altogether() -> None:
    two = changed(job(rank(0), rank(1)), 0, 1, sent=5e6, received=5e6)
    assert only(two).problem == "all links are slow: 40 Mbit/s"
    hundred = changed(job(rank(0), rank(1)), 0, 1, sent=11.8e6, received=11.8e6)
    assert judge(hundred) == []
    finding = only(dataclasses.replace(hundred, expected=125e6))
    assert finding.problem == "all links are slow: 94.4 Mbit/s, not 1 Gbit/s"


def test_clock_that_differs_by_more_than_its_measurement_bears() -> None:
    found = job(rank(0), rank(1))
    finding = only(changed(found, 0, 1, skew=-90.0))
    assert finding.problem.startswith("the clock of node1 is 90.0 s behind that of node0")
    assert judge(changed(found, 0, 1, skew=1.5, latency=2.0)) == []


def test_threads_and_ranks_beyond_the_cores() -> None:
    crowded = rank(0, threads=8, local_size=2)
    finding = only(job(crowded))
    assert finding.problem.startswith("node0 has 4 cores for 2 rank(s) of 8 threads each")
    assert finding.advice.startswith("export OMP_NUM_THREADS=2")
    assert only(job(rank(0), threads=5)).advice.startswith("runtime.threads=4")
    assert only(job(rank(0, local_size=5))).kind == "too many ranks"


def test_limit_of_a_container() -> None:
    finding = only(job(rank(0, quota=1.5)))
    assert (finding.kind, finding.wrong) == ("cpu limit", False)


def test_rank_that_never_arrived() -> None:
    finding = only(job(rank(0), rank(2), size=3))
    assert finding.problem == "rank 1 never arrived within 30 s"
    assert "rank  host           interface" in report.text(job(rank(0), rank(2), size=3), [finding])


def test_gpus_too_few_and_far_apart() -> None:
    found = judge(job(rank(0, local_size=2, gpus=["A"]), rank(1, gpus=["A", "B"], gpu_links=["GPU0 - GPU1: SYS"])))
    assert [(finding.kind, finding.wrong) for finding in found] == [
        ("too few gpus", True),
        ("gpu links", False),
        ("mixed gpus", False),
    ]


def test_nccl_on_another_interface() -> None:
    finding = only(job(rank(0, gpus=["A"]), rank(1, gpus=["A"], nccl_interfaces=["ib0"])))
    assert finding.problem == "NCCL on node1 would use ib0; eth0 leads to the other hosts"
    assert finding.advice == "on node1: export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0"


def test_group_that_does_not_form() -> None:
    finding = only(job(rank(0), rank(1), reductions=[Reduction("gloo", "no answer within 30 s")]))
    assert finding.problem == "gloo: all-reduce over all ranks failed: no answer within 30 s"


@pytest.mark.parametrize(("rate", "said"), [(1.25e9, "10 Gbit/s"), (GIGABIT, "936 Mbit/s"), (1e4, "0.08 Mbit/s")])
def test_rates_are_said_in_bits(rate: float, said: str) -> None:
    assert findings.mbits(rate) == said


def test_what_is_wrong_comes_first_and_is_counted() -> None:
    found = judge(job(rank(0, quota=2.0), rank(1, versions={**rank(1).versions, "torch": "2.6.0"})))
    assert [finding.wrong for finding in found] == [True, False]
    text = report.advice(found)
    assert text.startswith("WRONG  torch is")
    assert text.endswith("1 thing wrong")
