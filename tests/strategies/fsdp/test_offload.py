"""strategy.offload changes where a rank's part lies, and not a bit of what is trained."""

from __future__ import annotations

import errno
import itertools
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from distrain.errors import ConfigError, Failed
from distrain.files import mapped_memory
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.strategies.fsdp.options import FSDPConfig
from distrain.strategies.fsdp.strategy import FSDP
from distrain.training.memory import memory_line
from tests.harness import run_ranks, soaked
from tests.runs import check, compose, small, train_on_rank, trainer_for
from tests.strategies.fsdp.test_fsdp import SMALL_BLOCKS, TRANSFORMER

RUN = ("strategy=fsdp", *SMALL_BLOCKS, *TRANSFORMER, "optimizer=adamw", "checkpoint.every_steps=9")
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
    assert {path.name for path in tmp_path.iterdir()} == {*(f"{shard}_{to}" for shard, to in found if to != "resumed"), "again"}
