"""strategy=mesh whose ranks share what updates a stage, or parts of divided layers, trains as one process does."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from distrain.checkpoint import reader as checkpoint_reader
from distrain.checkpoint.format import checkpoint_path, checkpoints_folder
from distrain.data.base import data_source
from distrain.errors import ConfigError
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.strategies import held_memory
from tests.harness import run_ranks
from tests.runs import check, relative_difference, small, trainer_for

COMMON = ("trainer.max_steps=10", "trainer.epochs=9", "resume=never")
ADAM = ("optimizer=adam", "optimizer.eps=1e-3")
SGD = ("optimizer=sgd", "optimizer.lr=0.001")
#: Without dropout, whose draws depend on how a batch is divided.
VIT = ("model=custom", "model._target_=tests.strategies.tensor_parallel.models.ViT", "+model.kwargs.rate=0")
GROUP_NORM = ("model=custom", "model._target_=tests.runs.NormNet", "+model.kwargs.norm=group")
FP64 = "trainer.precision=fp64"
BATCH_NORM = "ResNet-18 batch norm"
#: Stages and shards, divided layers and shards: two ranks each, and four ranks altogether.
STAGES = ("strategy=mesh", "strategy.mesh.pipeline=2", "strategy.mesh.shard=2")
LAYERS = ("strategy=mesh", "strategy.mesh.tensor=2", "strategy.mesh.shard=2")
#: The same without shards.
REPLICAS = {
    STAGES: ("strategy=mesh", "strategy.mesh.pipeline=2"),
    LAYERS: ("strategy=mesh", "strategy.mesh.tensor=2"),
}
SHARDS = OPTIMIZER, GRADIENTS, FULL = (
    "strategy.shard=optimizer",
    "strategy.shard=gradients",
    "strategy.shard=full",
)
#: Many small blocks.
SMALL_BLOCKS = ("strategy.first_bucket_mb=1e-3", "strategy.bucket_mb=1e-3", "strategy.block_mb=1e-3")
#: Ways of training; a batch has 10 samples, the last one of an epoch 7.
WAYS: dict[str, tuple[str, ...]] = {
    "group norm": (
        *(*GROUP_NORM, *ADAM, FP64, "trainer.grad_clip_norm=0.1", "trainer.micro_batch_size=2"),
        *("optimizer.weight_decay=0.1", "optimizer.no_decay=[norm]"),
    ),
    "ViT": (*VIT, *ADAM, FP64, "trainer.grad_clip_norm=0.5", "trainer.micro_batch_size=4"),
    "few samples": (*GROUP_NORM, *ADAM, FP64, "data.batch_size=23"),
    "frozen": (*GROUP_NORM, *SGD, FP64, "data.train_size=25", "freeze=[{match: 'first.*', epochs: 1}]"),
    "float32": (*VIT, *ADAM, "trainer.grad_clip_norm=0.5"),
    "CIFAR-10 CNN": ("model=cifar_cnn", "data.height=32", "data.width=32", *ADAM, FP64),
    "ResNet-18 group norm": ("model=resnet18", "model.norm=group", *SGD, FP64, "trainer.memory_format=channels_last"),
    "own state": (
        *("model=custom", "model._target_=tests.strategies.tensor_parallel.models.SavedInItsOwnWay"),
        *ADAM,
        FP64,
    ),
    # Large enough for a microbatch of one sample.
    BATCH_NORM: ("model=resnet18", "model.norm=batch", "data.height=16", "data.width=16", *SGD, FP64),
}
#: Backward passes in two parts, of stages of which one has two parameters whose gradients torch makes as one tensor.
SPLIT = ("strategy.schedule=zbv_zero_bubble", "strategy.boundaries=[expand,blocks,blocks.0.norm2]")
#: A way of training, the keys of a mesh, and what is shared in it.
Case = tuple[str, tuple[str, ...], str]
#: What every run of the tests trains.
ALWAYS: list[Case] = [
    ("group norm", STAGES, FULL),
    ("float32", STAGES, OPTIMIZER),
    ("frozen", STAGES, GRADIENTS),
    ("ViT", (*STAGES, *SPLIT), GRADIENTS),
    ("ViT", LAYERS, FULL),
    ("float32", LAYERS, OPTIMIZER),
]
MORE: dict[tuple[str, ...], list[Case]] = {
    STAGES: [
        ("ViT", (*STAGES, "strategy.schedule=zbv_zero_bubble"), FULL),
        ("ViT", (*STAGES, *SPLIT), FULL),
    ],
    LAYERS: [
        ("ViT", (*LAYERS, "strategy.reshard_after_forward=false"), FULL),
        ("ViT", (*LAYERS, "model.checkpoint_activations=all"), FULL),
    ],
}
EVERYTHING: dict[tuple[str, ...], list[Case]] = {
    STAGES: [*itertools.product(WAYS, (STAGES,), SHARDS), *MORE[STAGES]],
    LAYERS: [*itertools.product(WAYS, (LAYERS,), SHARDS), *MORE[LAYERS]],
}


def train(*options: str) -> dict[str, Any]:
    """Trains in this process; returns the model, counts, and the bytes that the rank holds of each kind."""
    config, world = small(*options), World.from_environment()
    check(config, world)
    splits = data_source(config.data).load()
    with Runtime(config, world) as runtime:
        trainer = trainer_for(config, runtime, splits)
        summary = trainer.fit()
        strategy = trainer.strategy
        return {
            "model": {name: tensor.detach().clone() for name, tensor in strategy.model_state().items()},
            "counts": {count: summary[count] for count in ("test_correct", "test_count", "samples", "steps")},
            "held": held_memory.bytes_by_kind(strategy.held_tensors()),
            "sent": summary["bytes_sent_per_step"],
            "place": runtime.activity.place_of(world.rank),
        }


def train_each(runs: list[tuple[str, ...]]) -> list[dict[str, Any]]:
    """Trains each in turn in the same processes, because processes are slow to start."""
    return [train(*options) for options in runs]


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(ALWAYS, id="some"),
        *(pytest.param(cases, id=mesh[1], marks=pytest.mark.soak) for mesh, cases in EVERYTHING.items()),
    ],
)
def test_shards_of_stages_and_of_divided_layers_train_as_one_process(cases: list[Case], tmp_path: Path) -> None:
    ways = list(dict.fromkeys(way for way, _, _ in cases))
    alone = run_ranks(train_each, 1, _placed([(*COMMON, *WAYS[way]) for way in ways], tmp_path / "one"))[0]
    expected = dict(zip(ways, alone, strict=True))
    runs = [(*COMMON, *WAYS[way], *SMALL_BLOCKS, *mesh, shard) for way, mesh, shard in cases]
    # BatchNorm of a pipeline sees a microbatch at a time, so it is compared with the same pipeline without shards.
    replicas = [(*COMMON, *WAYS[way], *REPLICAS[STAGES]) for way in ways if way == BATCH_NORM]
    several = run_ranks(train_each, 4, _placed([*runs, *replicas], tmp_path / "many"), timeout=550)
    for (way, mesh, shard), *ranks in zip(cases, *(each[: len(runs)] for each in several), strict=True):
        usual = several[0][-1] if (way, mesh) == (BATCH_NORM, STAGES) else expected[way]
        bound = 1e-11 if FP64 in WAYS[way] else 1e-5
        other = "pipeline" if {*STAGES} <= {*mesh} else "tensor"
        # As messages and failure.json name them.
        assert [rank["place"] for rank in ranks] == [{"shard": n // 2, other: n % 2} for n in range(4)]
        for rank in ranks:
            assert relative_difference(rank["model"], usual["model"]) <= bound, (way, mesh, shard)
            assert rank["counts"] == usual["counts"], (way, mesh, shard)


def _placed(runs: list[tuple[str, ...]], folder: Path) -> list[tuple[str, ...]]:
    return [(*options, f"run_dir={folder}/{index}") for index, options in enumerate(runs)]


# --- several runs of one model ---------------------------------------------------------------------------------------

#: A chain of runs: each goes on where the one before ended.
CHAIN: list[tuple[int, tuple[str, ...]]] = [
    (4, (*STAGES, FULL)),
    (6, (*LAYERS, FULL)),
    (8, ("strategy=ddp",)),
    (10, (*LAYERS, OPTIMIZER)),
    (12, (*STAGES, GRADIENTS)),
]
SHARED = (
    *(*GROUP_NORM, FP64, *ADAM, "scheduler=constant"),
    *("trainer.epochs=100", "trainer.ema.decay=0.9", "trainer.deterministic=true"),
)
TOPK = ("compression=topk", "compression.min_elements=1", "trainer.max_steps=6", "resume=never")


def shared_runs(folder: str, shard: str) -> dict[str, Any]:
    """What four ranks train one after the other: a chain, the same twice, and with compression."""
    found: dict[str, Any] = {"chain": []}
    for steps, mesh in CHAIN:
        found["chain"].append(train(*SHARED, *mesh, f"trainer.max_steps={steps}", f"run_dir={folder}/chain"))
    for name, mesh in (("stages", STAGES), ("layers", LAYERS)):
        saved = ("checkpoint.every_steps=3", "checkpoint.keep=9", "trainer.max_steps=6")
        options = (*SHARED, *mesh, shard, *saved)
        whole = train(*options, f"run_dir={folder}/{name}")
        start = checkpoint_path(checkpoints_folder(Path(folder, name)), 3)
        again = train(*options, f"run_dir={folder}/{name} again", f"resume={start}")
        usual = train(*SHARED, *REPLICAS[mesh], *TOPK, f"run_dir={folder}/{name} replicas")
        compressed = train(*SHARED, *mesh, OPTIMIZER, *TOPK, f"run_dir={folder}/{name} compressed")
        found[name] = {"whole": whole, "again": again, "usual": usual, "compressed": compressed}
    return found


@pytest.mark.parametrize("shard", [pytest.param(GRADIENTS, marks=pytest.mark.soak), FULL])
def test_shards_resume_compress_and_hold_what_they_should(shard: str, tmp_path: Path) -> None:
    serial = [
        (f"trainer.max_steps={steps}", f"run_dir={tmp_path}/{name}") for steps, name in ((12, "one"), (2, "chain"))
    ]
    expected = run_ranks(train_each, 1, [(*SHARED, *options) for options in serial])[0][0]
    ranks = run_ranks(shared_runs, 4, str(tmp_path), shard)
    for rank in ranks:
        assert relative_difference(rank["chain"][-1]["model"], expected["model"]) <= 1e-11
        assert rank["chain"][-1]["counts"] == expected["counts"]
        for name in ("stages", "layers"):
            runs = rank[name]
            assert all(
                torch.equal(tensor, runs["again"]["model"][key]) for key, tensor in runs["whole"]["model"].items()
            )
            assert relative_difference(runs["compressed"]["model"], runs["usual"]["model"]) <= 1e-11
    for name in ("stages", "layers"):
        checkpoint = checkpoint_path(checkpoints_folder(tmp_path / name), 6)
        state = checkpoint_reader.load(checkpoint)[0]
        assert set(state["model"]) == set(expected["model"])
        names = {f"{key}/{moment}" for key in state["model"] for moment in ("exp_avg", "exp_avg_sq", "step")}
        assert set(state["optimizer"]) == names
        assert all(state["optimizer"][f"{key}/exp_avg"].shape == each.shape for key, each in expected["model"].items())
        writers = {path.name for path in checkpoint.glob("optimizer_*.safetensors")}
        # A rank that divides layers saves the tensors that begin in its part, of which a small model may have none.
        assert len(writers) >= 3
        # Of all ranks together, so that it doesn't depend on where the model was cut.
        whole, usual = (
            {kind: sum(rank[name][run]["held"][kind] for rank in ranks) for kind in rank[name][run]["held"]}
            for run in ("whole", "usual")
        )
        for kind in ("optimizer", "gradients", *(["parameters"] if shard == FULL else [])):
            assert whole[kind] == pytest.approx(usual[kind] / 2, rel=0.05), (name, kind)


@pytest.mark.soak
@pytest.mark.parametrize("shard", SHARDS)
def test_shards_of_divided_stages_train_and_resume_as_one_process(shard: str, tmp_path: Path) -> None:
    options = (
        *(*VIT, *ADAM, FP64, "scheduler=constant", "trainer.epochs=100", "trainer.grad_clip_norm=0.5"),
        *("trainer.deterministic=true", "checkpoint.every_steps=3", "checkpoint.keep=9", "trainer.max_steps=6"),
    )
    everything = (*options, *STAGES, "strategy.mesh.tensor=2", shard, *SMALL_BLOCKS)
    start = f"resume={checkpoint_path(checkpoints_folder(tmp_path / 'several'), 3)}"
    several = [(*everything, f"run_dir={tmp_path}/several"), (*everything, f"run_dir={tmp_path}/again", start)]
    ranks = run_ranks(train_each, 8, several, timeout=550)
    alone = [(*options, f"run_dir={tmp_path}/one"), (*options, f"run_dir={tmp_path}/moved", start)]
    expected, moved = run_ranks(train_each, 1, alone)[0]
    assert relative_difference(moved["model"], expected["model"]) <= 1e-11
    for whole, again in ranks:
        assert relative_difference(whole["model"], expected["model"]) <= 1e-11
        assert whole["counts"] == expected["counts"]
        assert all(torch.equal(tensor, again["model"][name]) for name, tensor in whole["model"].items())


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            (*LAYERS, GRADIENTS, "compression=topk"),
            "compression=topk: compresses all-reduces, and strategy.shard=gradients has none; strategy.shard=optimizer "
            "has; choices: none",
        ),
        (
            (*STAGES, OPTIMIZER, "optimizer.sam_rho=0.1"),
            "optimizer.sam_rho=0.1: strategy=mesh can't make a step of two",
        ),
        ((*STAGES, OPTIMIZER, "optimizer=muon"), "optimizer.name=muon: updates a parameter as a whole"),
    ],
)
def test_what_is_not_possible_is_refused_in_one_line(overrides: tuple[str, ...], line: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check(small(*GROUP_NORM, *overrides), World(0, 4, 0, 4, "here"))
    assert str(refused.value).startswith(line)
