"""Parameters that are frozen in the first epochs: every strategy trains, exchanges and resumes as one process does."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch import Tensor, nn

from distrain.checkpoint import reader as checkpoint_reader
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.strategies.pipeline import split
from distrain.strategies.pipeline.block_costs import BlockCost, measure_blocks
from tests.harness import run_ranks, soaked
from tests.runs import relative_difference, small, trainer_for

#: First the last layer alone is trained, then a part before it too, from epoch 2 on all but one layer.
FREEZE = (
    "freeze=[{{match: head, epochs: 0}}, {{match: {never}}}, {{match: {later}, epochs: 1}}, {{match: '*', epochs: 2}}]"
)
COMMON = (
    "optimizer=sgd",
    "optimizer.lr=0.05",
    "optimizer.weight_decay=0.01",
    "scheduler=constant",
    "trainer.precision=fp64",
    "trainer.epochs=3",
)
NORM_NET = (
    "model=custom",
    "model._target_=tests.runs.NormNet",
    FREEZE.format(never="first.1.*", later="second.*"),
)
BATCH_NORM, GROUP_NORM = (*NORM_NET, "+model.kwargs.norm=batch"), (*NORM_NET, "+model.kwargs.norm=group")
#: LoRA in three layers and a normalisation that is trained too; at first the last layer alone is trained.
LORA = (
    "model=custom",
    "model._target_=tests.runs.PointwiseNet",
    "lora.rank=2",
    "lora.alpha=3",
    "lora.also_train=[head,norm.*]",
    "freeze=[{match: head, epochs: 0}, {match: '*.lora_*', epochs: 1}, {match: '*', epochs: 2}]",
)
LORA_BATCH_NORM, LORA_GROUP_NORM = (*LORA, "+model.kwargs.norm=batch"), (*LORA, "+model.kwargs.norm=group")
CNN = ("model=simple_cnn", FREEZE.format(never="block1.*", later="dense.*"))
MOMENTUM = ("optimizer.momentum=0.9", "optimizer.layer_decay=0.5", "trainer.grad_clip_norm=1")
LOSSY = ("optimizer=adamw", "compression.min_elements=30", *BATCH_NORM)

#: Weights become zero in three rounds, and one of them is before a stop; what is frozen is pruned too.
PRUNED = (*BATCH_NORM, *MOMENTUM, "prune.amount=0.7", "prune.rounds=3", "prune.rise_epochs=2.2")
#: Ways to train that equal one process: number of ranks, what one process has too, and the rest.
EQUAL: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]] = {
    "ddp": (
        3,
        (*BATCH_NORM, *MOMENTUM),
        ("strategy=ddp", "strategy.first_bucket_mb=0.0005", "strategy.bucket_mb=0.001"),
    ),
    "pipeline": (
        2,
        (*CNN, *MOMENTUM),
        ("strategy=pipeline", "strategy.stages=4", "strategy.schedule=zbv_zero_bubble", "strategy.microbatches=4"),
    ),
    "local_sgd": (3, (*GROUP_NORM, "optimizer.momentum=0"), ("strategy=local_sgd", "strategy.sync_every=1")),
    "parameter_server": (4, (*GROUP_NORM, *MOMENTUM), ("strategy=parameter_server", "strategy.servers=2")),
    "fsdp": (3, (*BATCH_NORM, *MOMENTUM), ("strategy=fsdp", "strategy.block_mb=0.0005")),
    "tensor_parallel": (2, (*CNN, *MOMENTUM), ("strategy=tensor_parallel",)),
    "LoRA, fsdp": (2, (*LORA_BATCH_NORM, *MOMENTUM), ("strategy=fsdp", "strategy.shard=gradients")),
    "LoRA, ddp": (3, (*LORA_BATCH_NORM, *MOMENTUM), ("strategy=ddp", "strategy.first_bucket_mb=0.0005")),
    "LoRA, pipeline": (
        2,
        (*LORA_GROUP_NORM, *MOMENTUM),
        ("strategy=pipeline", "strategy.stages=2", "strategy.boundaries=[hidden]", "strategy.microbatches=2"),
    ),
    "LoRA, replicated stages": (
        4,
        (*LORA_GROUP_NORM, *MOMENTUM),
        ("strategy=pipeline", "strategy.stages=2", "strategy.boundaries=[widen]"),
    ),
    "LoRA, local_sgd": (
        2,
        (*LORA_GROUP_NORM, "optimizer.momentum=0"),
        ("strategy=local_sgd", "strategy.sync_every=1"),
    ),
    "LoRA, parameter_server": (3, (*LORA_GROUP_NORM, *MOMENTUM), ("strategy=parameter_server",)),
}
EQUAL |= {
    "pruned, ddp": (2, PRUNED, ("strategy=ddp", "strategy.first_bucket_mb=0.0005")),
    "pruned, fsdp": (2, PRUNED, ("strategy=fsdp", "strategy.block_mb=0.0005")),
    "pruned, pipeline": (2, PRUNED, ("strategy=pipeline", "strategy.stages=2", "strategy.microbatches=1")),
    "pruned, parameter_server": (
        3,
        (*GROUP_NORM, *PRUNED[len(BATCH_NORM) :]),
        ("strategy=parameter_server", "strategy.servers=1"),
    ),
}
#: In a stage of its own, the normalisation without parameters is not part of anything that is frozen as a whole.
EQUAL["normalisation between stages"] = (
    2,
    (
        "model=custom",
        "model._target_=tests.strategies.test_freezing.normalised",
        "freeze=[{match: 0.*, epochs: 1}]",
        "optimizer.momentum=0.9",
    ),
    ("strategy=pipeline", "strategy.stages=2", "strategy.boundaries=[3]", "strategy.microbatches=1"),
)
#: The module decides by its mode, so no stage begins in it.
EQUAL["frozen mode"] = (
    2,
    (
        "model=custom",
        "model._target_=tests.strategies.pipeline.traced_models.LooksAtMode",
        "freeze=[{match: body.scale, epochs: 1}]",
        "optimizer.momentum=0.9",
    ),
    ("strategy=pipeline", "strategy.stages=2"),
)
#: Ways that lose information.
LOSING: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]] = {
    "powersgd": (3, LOSSY, ("strategy=ddp", "compression=powersgd", "compression.min_compression_rate=1")),
    "replicated stages": (
        4,
        LOSSY,
        ("strategy=pipeline", "strategy.stages=2", "compression=qsgd"),
    ),
    "pruned, local_sgd": (
        2,
        (*LOSSY, *PRUNED[-3:]),
        (
            "strategy=local_sgd",
            "strategy.sync_every=4",
            "strategy.overlap_steps=2",
            "strategy.outer_optimizer=nesterov",
            "compression=topk",
        ),
    ),
    # Where stages are cut decides in which order the squares of a norm are added up.
    "clipped stages": (2, (*GROUP_NORM, *MOMENTUM), ("strategy=pipeline", "strategy.stages=2")),
    "merges under way": (
        2,
        LOSSY,
        (
            "strategy=local_sgd",
            "strategy.sync_every=4",
            "strategy.fragments=2",
            "strategy.overlap_steps=2",
            "strategy.outer_optimizer=nesterov",
            "compression=topk",
        ),
    ),
}
#: Ways that are tried by make test-soak alone.
LONG = (
    "local_sgd",
    "tensor_parallel",
    "replicated stages",
    "normalisation between stages",
    "frozen mode",
    "clipped stages",
    *(way for way in EQUAL if way.startswith("LoRA")),
    "pruned, ddp",
    "pruned, pipeline",
    "pruned, parameter_server",
)
#: Where runs in parts stop: an epoch has five steps.
STOPS = (5, 11)


def normalised(in_channels: int, num_classes: int) -> nn.Module:
    norm, features = nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 4, 3)
    pooled = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), norm, features, *pooled, nn.Linear(4, num_classes))


@contextlib.contextmanager
def slow_block(index: int) -> Iterator[None]:
    """A pipeline finds that this block takes most of the time."""

    def planted(*arguments: Any) -> list[BlockCost]:
        costs = [dataclasses.replace(cost, forward_ms=1.0, backward_ms=1.0) for cost in measure_blocks(*arguments)]
        costs[index] = dataclasses.replace(costs[index], forward_ms=1000.0)
        return costs

    with mock.patch.object(split, "measure_blocks", planted):
        yield


def train(runs: list[tuple[str, ...]]) -> None:
    """Trains on this rank, one run after the other; from the third on, the last block is slow instead of the first."""
    for index, overrides in enumerate(runs):
        configuration = small(*COMMON, *overrides)
        with Runtime(configuration, World.from_environment()) as runtime, slow_block(-1 if index > 1 else 0):
            trainer_for(configuration, runtime).fit()


def train_whole_and_in_parts(ranks: int, folder: Path, *overrides: str) -> None:
    """Trains without stops into ``whole``, and with stops into ``parts``; see :func:`train`."""
    stops = [*((f"trainer.max_steps={step}",) for step in STOPS), ()]
    parts = [(*overrides, f"run_dir={folder}/parts", *stop) for stop in stops]
    run_ranks(train, ranks, [(*overrides, f"run_dir={folder}/whole"), *parts])


def last_checkpoint(run: Path) -> Path:
    return run / "checkpoints" / "step_00000015"


def tensor_files(run: Path) -> dict[str, str]:
    """The hashes of all files of tensors in the last checkpoint: model, optimizer, compressors, each rank's own."""
    files: dict[str, Any] = json.loads((last_checkpoint(run) / "manifest.json").read_text())
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}


@functools.cache
def alone(folder: Path, overrides: tuple[str, ...]) -> Mapping[str, Tensor]:
    run = folder / str(abs(hash(overrides)))
    train([(*overrides, f"run_dir={run}")])
    return checkpoint_reader.load_model(last_checkpoint(run))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("alone")


@pytest.mark.parametrize("way", soaked((*EQUAL, *LOSING), [way for way in (*EQUAL, *LOSING) if way not in LONG]))
def test_a_run_with_frozen_epochs_equals_one_process_and_is_resumed_exactly(
    way: str, folder: Path, tmp_path: Path
) -> None:
    ranks, common, own = {**EQUAL, **LOSING}[way]
    train_whole_and_in_parts(ranks, tmp_path, *common, *own)
    assert tensor_files(tmp_path / "parts") == tensor_files(tmp_path / "whole")
    if way in EQUAL:
        model = checkpoint_reader.load_model(last_checkpoint(tmp_path / "whole"))
        assert relative_difference(model, alone(folder, common)) <= 1e-12
