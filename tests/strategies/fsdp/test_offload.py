"""strategy.offload changes where a rank's part lies, and not a bit of what is trained."""

from __future__ import annotations

import errno
import functools
import gc
import itertools
import json
import socket
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from distrain.errors import Failed
from distrain.files.mapped_memory import MappedFile
from distrain.optim.optimizers.build import build_optimizer
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.strategies.fsdp.offload import HostOffload, Offload
from distrain.strategies.fsdp.options import FSDPConfig
from distrain.training.memory import memory_line
from tests.harness import run_ranks, soaked
from tests.runs import small, train_on_rank, trainer_for
from tests.strategies.fsdp.test_fsdp import SMALL_BLOCKS, TRANSFORMER

RUN = ("strategy=fsdp", *SMALL_BLOCKS, *TRANSFORMER, "optimizer=adamw", "checkpoint.keep=9")
#: What is trained, with keys that need more of the optimizer.
WAYS: dict[str, tuple[str, ...]] = {
    "optimizer": ("trainer.grad_clip_norm=0.5",),
    "gradients": ("optimizer=lion", "optimizer.groups=[{match: head, epochs: 1}]"),
    "full": ("optimizer.lookahead.every=2", "trainer.ema.decay=0.9", "checkpoint.every_steps=2"),
}
ALL = [*itertools.product(WAYS, ("file", "host"))]
PART = [("optimizer", "file"), ("gradients", "host"), ("full", "file")]


def trained(ways: list[tuple[str, str]], folder: str) -> dict[tuple[str, str], Any]:
    """Each way as ``strategy.offload`` says, without it, and one of them resumed."""
    found = {}
    common = ("trainer.max_steps=5", f"strategy.offload_folder={folder}")
    for shard, offload in [*dict.fromkeys((shard, "none") for shard, _ in ways), *ways]:
        keys = (f"strategy.shard={shard}", f"strategy.offload={offload}", *WAYS[shard])
        # Copies are made though the device's memory is the host's.
        with mock.patch.object(FSDPConfig, "check") if offload == "host" else nullcontext():
            found[shard, offload] = train_on_rank(small(*RUN, *common, *keys, f"run_dir={folder}/{shard}_{offload}"))
    again = (f"run_dir={folder}/again", f"resume={folder}/full_file/checkpoints/step_00000002")
    keys = ("strategy.shard=full", "strategy.offload=file", *WAYS["full"])
    return {**found, ("full", "resumed"): train_on_rank(small(*RUN, *common, *keys, *again))}


@pytest.mark.parametrize("ways", soaked([PART, ALL], [PART]), ids=len)
def test_the_training_is_the_same_bit_for_bit(ways: list[tuple[str, str]], tmp_path: Path) -> None:
    for found in run_ranks(trained, 2, ways, str(tmp_path)):
        for (shard, offload), run in found.items():
            expected = found[shard, "none"]["model"]
            assert all(torch.equal(tensor, expected[name]) for name, tensor in run["model"].items()), (shard, offload)
        # What is there and what is elsewhere is what there was, but for one number a parameter.
        for shard, moved in (("optimizer", {"optimizer"}), ("full", {"parameters", "optimizer"})):
            summary = found[shard, "file"]["summary"]
            kept = found[shard, "none"]["summary"]["memory_by_kind_mb"]["measured"]
            assert summary["offloaded"]["to"] == "file"
            assert summary["offloaded"]["mb"].keys() == moved
            for kind in ("parameters", "gradients", "optimizer"):
                here = summary["memory_by_kind_mb"]["measured"][kind]
                assert here + summary["offloaded"]["mb"].get(kind, 0.0) == pytest.approx(kept[kind], abs=0.15), kind
            assert "; in files " in memory_line(summary)
        assert "offloaded" not in found["full", "none"]["summary"]
    # The files have no name, so none can be left behind.
    runs = {f"{shard}_{offload}" for shard, offload in found if offload != "resumed"}
    assert {path.name for path in tmp_path.iterdir()} == {*runs, "again"}


def test_a_block_that_was_frozen_counts_the_updates_of_the_others() -> None:
    config = small("optimizer.lookahead.every=2", "optimizer.lr=0.1").optimizer
    make = functools.partial(build_optimizer, config, total_steps=5)
    found = []
    for place in (Offload(), HostOffload(keeps_parts=True, copies=False)):
        slices = {name: nn.Parameter(torch.ones(3)) for name in ("head", "body")}
        optimizer = place.make_optimizer(make, [{name: piece} for name, piece in slices.items()])
        for step in range(5):
            slices["head"].grad = torch.full((3,), 1.0 + step)
            # Trained from the second update on.
            slices["body"].grad = torch.full((3,), 2.0 + step) if step else None
            optimizer.step()
        found.append(slices)
    assert all(torch.equal(found[0][name], piece) for name, piece in found[1].items())


def full_disk(folder: str) -> str:
    """Trains where the second rank's disk has no room."""
    second = World.from_environment().rank == 1
    full = OSError(errno.ENOSPC, "No space left on device (3.0 MiB are needed)", "/full")
    disk = mock.patch.object(MappedFile, "reserve", side_effect=full) if second else nullcontext()
    with disk, pytest.raises(Failed) as failed:
        train_on_rank(small(*RUN, "strategy.offload=file", "trainer.max_steps=2", f"run_dir={folder}"))
    return str(failed.value.__cause__)


def test_a_full_disk_ends_the_run_before_the_first_step(tmp_path: Path) -> None:
    refused = "strategy.offload_folder=null: /full: No space left on device (3.0 MiB are needed)"
    line = f"{refused} (rank 1 on {socket.gethostname()})"
    assert run_ranks(full_disk, 2, str(tmp_path)) == [line] * 2
    failure = json.loads((tmp_path / "failure.json").read_text())
    assert line in failure["error"]
    assert not failure["step"]


class Large(nn.Sequential):
    """Layers of 16 MiB, 256 together."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        layers = [nn.Linear(2048, 2048, bias=False) for _ in range(16)]
        super().__init__(nn.Flatten(), nn.Linear(64 * in_channels, 2048), *layers, nn.Linear(2048, num_classes))


def resident_mb(field: str) -> float:
    """What Linux says of this process's memory: ``VmRSS``, now, or ``VmHWM``, the most since it was reset."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024


def residents(folder: str) -> dict[str, tuple[float, float]]:
    """Most of the memory of the process in a step, and its memory after it."""
    found = {}
    for offload in ("file", "none"):
        model = ("model=custom", "model._target_=tests.strategies.fsdp.test_offload.Large", "optimizer=adam")
        keys = ("strategy=fsdp", f"strategy.offload={offload}", f"strategy.offload_folder={folder}")
        config = small(*model, *keys, f"run_dir={folder}/{offload}")
        with Runtime(config, World.from_environment()) as runtime:
            trainer = trainer_for(config, runtime)
            batches = [*itertools.islice(trainer.loaders["train"].epoch(0), 3)]
            for batch in batches[:2]:
                trainer.strategy.train_step(batch)
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")
            trainer.strategy.train_step(batches[2])
            found[offload] = resident_mb("VmHWM"), resident_mb("VmRSS")
        del trainer, batches
        gc.collect()
    return found


@pytest.mark.soak
def test_a_step_has_only_the_block_in_use_in_memory(tmp_path: Path) -> None:
    for found in run_ranks(residents, 2, str(tmp_path)):
        # Half of the parameters, and of Adam's two moments.
        kept = (1 + 2) * 128
        for peak_or_rest, (offloaded, plain) in enumerate(zip(found["file"], found["none"], strict=True)):
            # A block's part of them is there during the update.
            assert plain - offloaded > 0.9 * kept - (24 if peak_or_rest == 0 else 0)
