"""The bytes that a run says it sends are those that leave the hosts' network interfaces.

Takes minutes, so it runs by ``make test-net`` only.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

from distrain.communication.collectives import Ledger
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.strategies.base import Strategy
from distrain.tools.testnet.network import VirtualNetwork, payload_bytes_sent
from distrain.training.callbacks import Callback, RunView
from tests.hosts import needs_network, run_on_hosts
from tests.runs import compose, trainer_for

pytestmark = [
    needs_network,
    pytest.mark.skipif("DISTRAIN_TEST_NET" not in os.environ, reason="takes long; make test-net runs it"),
]

#: Steps between which the interfaces are looked at: the first ones may exchange more, and the last one is followed by
#: an evaluation.
FIRST, LAST = 4, 20
#: Whole batches of images, since a smaller one would send fewer activations.
KEYS = (
    *("data=synthetic", "data.channels=3", "data.height=20", "data.width=20", "data.train_size=800"),
    *("data.test_size=16", "data.batch_size=16", "model=cifar_cnn", "optimizer=sgd", "optimizer.lr=0.01"),
    *(f"trainer.max_steps={LAST + 1}", "logger=none", "trainer.progress=off", "runtime.threads=1"),
)
MICROBATCHES = "strategy.microbatches=2"
#: Strategies by what they are called.
WAYS: dict[str, tuple[str, ...]] = {
    "ddp": ("strategy=ddp",),
    **{f"fsdp {shard}": ("strategy=fsdp", f"strategy.shard={shard}") for shard in ("optimizer", "gradients", "full")},
    "tensor parallel": ("strategy=tensor_parallel",),
    "data × tensor": ("strategy=mesh", "strategy.mesh.data=2", "strategy.mesh.tensor=2"),
    "data × pipeline": ("strategy=mesh", "strategy.mesh.data=2", "strategy.mesh.pipeline=2", MICROBATCHES),
    "pipeline × tensor": ("strategy=mesh", "strategy.mesh.pipeline=2", "strategy.mesh.tensor=2", MICROBATCHES),
    "data × shard": ("strategy=mesh", "strategy.mesh.data=2", "strategy.mesh.shard=2"),
    "shard × tensor": (
        *("strategy=mesh", "strategy.mesh.shard=2", "strategy.mesh.tensor=2"),
        "strategy.shard=gradients",
    ),
    "shard × pipeline": (
        *("strategy=mesh", "strategy.mesh.shard=2", "strategy.mesh.pipeline=2"),
        *("strategy.shard=gradients", MICROBATCHES),
    ),
}
#: Meshes of which each replica is on a host, so that only the gradients leave it.
REPLICAS = ("data × tensor", "data × pipeline")


class InterfaceCounter(Callback):
    """Looks at the interface of this rank's host, and at what was counted, after two steps.

    Args:
        strategy: Of this rank.
        counted: The bytes that are counted.
    """

    def __init__(self, strategy: Strategy, counted: Ledger) -> None:
        self._everyone, self._counted = strategy.runtime.communicator(), counted
        self.seen: list[tuple[int, int]] = []

    @override
    def on_step_end(self, run: RunView) -> None:
        if run.progress.step in (FIRST, LAST):
            # What the others of this host send in the step has left it.
            self._everyone.barrier()
            self.seen.append((payload_bytes_sent(), self._counted.total()))
            self._everyone.barrier()


def counted_on_rank(keys: tuple[str, ...], what: str) -> dict[str, Any]:
    """Trains, and returns bytes a step: of the interface, as they were counted, and of all ranks in the summary.

    Args:
        keys: Of the run.
        what: ``all`` bytes are counted, or those that ``replicas`` send each other.
    """
    config, world = compose(*KEYS, *keys), World.from_environment()
    with Runtime(config, world) as runtime:
        trainer = trainer_for(config, runtime)
        strategy = trainer.strategy
        counted = strategy.ledger
        if what == "replicas":
            # Beside that of what stays within a host.
            counted = strategy.replicas.ledger = Ledger()
        counter = InterfaceCounter(strategy, counted)
        trainer.callbacks.append(counter)
        summary = trainer.fit()
    first, last = counter.seen
    left, sent = ((after - before) / (LAST - FIRST) for before, after in zip(first, last, strict=True))
    # All ranks of a host have its interface.
    left = left if world.local_rank == 0 else 0.0
    return {"interface": left, "counted": sent, "summary": summary["bytes_sent_per_step"]}


@pytest.mark.parametrize("way", WAYS)
def test_a_summary_counts_what_leaves_the_hosts(way: str, four_hosts: VirtualNetwork, tmp_path: Path) -> None:
    ranks = run_on_hosts(four_hosts, counted_on_rank, (*WAYS[way], f"run_dir={tmp_path}"), "all")
    interfaces = sum(rank["interface"] for rank in ranks)
    print(f"{way}: summary {ranks[0]['summary']:,.0f}, interfaces {interfaces:,.0f}")
    assert interfaces == pytest.approx(ranks[0]["summary"], rel=0.05)


@pytest.mark.parametrize("way", REPLICAS)
def test_of_replicas_on_hosts_of_their_own_gradients_alone_leave_the_hosts(
    way: str, two_hosts: VirtualNetwork, tmp_path: Path
) -> None:
    ranks = run_on_hosts(two_hosts, counted_on_rank, (*WAYS[way], f"run_dir={tmp_path}"), "replicas", per_host=2)
    interfaces, counted = (sum(rank[name] for rank in ranks) for name in ("interface", "counted"))
    print(f"{way}, two ranks a host: counted {counted:,.0f}, interfaces {interfaces:,.0f}")
    assert interfaces == pytest.approx(counted, rel=0.05)
