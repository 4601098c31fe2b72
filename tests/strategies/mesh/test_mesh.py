"""strategy=mesh trains as one process does, whatever the dimensions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distrain.checkpoint.format import checkpoint_path, checkpoints_folder
from distrain.errors import ConfigError
from distrain.runtime.world import World
from tests.harness import run_ranks
from tests.runs import check, relative_difference, small, train_on_rank

VIT = ("model=custom", "model._target_=tests.strategies.tensor_parallel.models.ViT")
COMMON = ("trainer.max_steps=10", "trainer.epochs=9", "resume=never")
ADAM = ("optimizer=adam", "optimizer.eps=1e-3")
SGD = ("optimizer=sgd", "optimizer.lr=0.001")
CIFAR_CNN = ("model=cifar_cnn", "data.height=32", "data.width=32")
FP64 = "trainer.precision=fp64"
#: Ways of training; a batch has 10 samples, the last one of an epoch 7.
WAYS: dict[str, tuple[str, ...]] = {
    "ViT": (*VIT, *ADAM, FP64, "trainer.grad_clip_norm=0.5", "+model.kwargs.rate=0"),
    "ViT, accumulated": (*VIT, *ADAM, "trainer.micro_batch_size=2", "+model.kwargs.rate=0"),
    "CIFAR-10 CNN": (*CIFAR_CNN, *ADAM, FP64, "trainer.grad_clip_norm=0.5"),
    "ResNet-18 group norm": ("model=resnet18", "model.norm=group", *SGD, "trainer.grad_clip_norm=1"),
    "ResNet-18 batch norm": ("model=resnet18", "model.norm=batch", *SGD, FP64),
}
#: Dimensions by the product that they stand for.
DATA_TENSOR = ("strategy.mesh.data=2", "strategy.mesh.tensor=2")
DATA_PIPELINE = ("strategy.mesh.data=2", "strategy.mesh.pipeline=2")
TENSOR_PIPELINE = ("strategy.mesh.tensor=2", "strategy.mesh.pipeline=2")
ALL_THREE = ("strategy.mesh.data=2", "strategy.mesh.tensor=2", "strategy.mesh.pipeline=2")
#: Without microbatches a pipeline's BatchNorm sees the whole batch, as one process does.
WHOLE = ("strategy.microbatches=1",)
ZERO_BUBBLE = ("strategy.schedule=zbv_zero_bubble",)
Case = tuple[str, tuple[str, ...]]
ALWAYS: list[Case] = [
    ("ViT", DATA_TENSOR),
    ("ViT", (*TENSOR_PIPELINE, *ZERO_BUBBLE)),
    ("ViT, accumulated", (*TENSOR_PIPELINE, "model.checkpoint_activations=all")),
]
FOUR: list[Case] = [
    *((way, DATA_TENSOR) for way in WAYS),
    *((way, DATA_PIPELINE) for way in WAYS if "batch" not in way),
    *((way, (*TENSOR_PIPELINE, *(WHOLE if "batch" in way else ()))) for way in WAYS),
    ("CIFAR-10 CNN", (*TENSOR_PIPELINE, *ZERO_BUBBLE)),
    ("ViT", (*TENSOR_PIPELINE, *ZERO_BUBBLE)),
    ("ViT", (*DATA_TENSOR, "model.checkpoint_activations=all")),
    ("ViT, accumulated", (*TENSOR_PIPELINE, "model.checkpoint_activations=all")),
    # Everything is sent, but as a compressor does it.
    ("ViT", (*DATA_TENSOR, "compression=topk", "compression.density=1")),
    ("ViT", (*DATA_TENSOR, "optimizer.sam_rho=0.05")),
]
EIGHT: list[Case] = [(way, ALL_THREE) for way in WAYS if "batch" not in way]


def train_each(cases: list[Case], folder: str) -> list[dict[str, Any]]:
    """Trains each in turn in the same processes, because processes are slow to start."""
    return [
        train_on_rank(small(*COMMON, *WAYS[way], *more, f"run_dir={folder}/{number}"))
        for number, (way, more) in enumerate(cases)
    ]


def alone(case: Case) -> Case:
    """The case of one process."""
    way, more = case
    return way, tuple(option for option in more if option.startswith("optimizer."))


@pytest.fixture(scope="module")
def serial() -> dict[Case, Any]:
    return {}


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        pytest.param(4, ALWAYS, id="4 ranks"),
        pytest.param(4, FOUR, id="4 ranks, all", marks=pytest.mark.soak),
        pytest.param(8, EIGHT, id="8 ranks", marks=pytest.mark.soak),
    ],
)
def test_a_mesh_is_the_serial_run(ranks: int, cases: list[Case], serial: dict[Case, Any], tmp_path: Path) -> None:
    new = list({alone(case): None for case in cases if alone(case) not in serial})
    if new:
        serial |= dict(zip(new, run_ranks(train_each, 1, new, str(tmp_path / "one"), timeout=500)[0], strict=True))
    on_mesh = [(way, ("strategy=mesh", *more)) for way, more in cases]
    several = run_ranks(train_each, ranks, on_mesh, str(tmp_path / "many"), timeout=900)
    for (way, more), *runs in zip(cases, *several, strict=True):
        expected = serial[alone((way, more))]
        for run in runs:
            bound = 1e-11 if FP64 in WAYS[way] else 1e-5
            assert relative_difference(run["model"], expected["model"]) <= bound, (way, more)
            for count in ("test_correct", "test_count", "samples", "steps"):
                assert run["summary"][count] == expected["summary"][count], (way, more, count)
            assert run["summary"]["test_loss"] == pytest.approx(expected["summary"]["test_loss"], rel=1e-4)
            assert run["summary"]["bytes_sent_per_step"] > 0
            if "strategy.mesh.tensor=2" in more:
                layers = run["summary"]["tensor_parallel"]
                assert layers["divided"], (way, more)
                assert layers["whole"], (way, more)
        for run in runs[1:]:
            assert relative_difference(run["model"], runs[0]["model"]) == 0, (way, more)


RESUMED = (*VIT, *ADAM, FP64, "+model.kwargs.rate=0", "scheduler=constant", "trainer.grad_clip_norm=0.5")
#: Saved in the middle of an epoch of five steps.
SAVED, STEPS = 3, 7
#: What each part of a mesh sends to its replicas is compressed; what is left out is saved and restored.
COMPRESSED = ("compression=powersgd", "compression.min_elements=100", "trainer.deterministic=true")


def resumed(folder: str) -> dict[str, Any]:
    """Trains at once, again from a checkpoint of that, and from one of one process, all in one group of ranks."""
    found: dict[str, Any] = {}
    for name, mesh in (("layers", (*DATA_TENSOR, *COMPRESSED)), ("stages", TENSOR_PIPELINE)):
        saved = (f"checkpoint.every_steps={SAVED}", "checkpoint.keep=9", f"trainer.max_steps={STEPS}")
        options = (*RESUMED, "strategy=mesh", *mesh, *saved)
        found[f"{name} whole"] = train_on_rank(small(*options, f"run_dir={folder}/{name} whole"))["model"]
        # It keeps the split into stages, which is chosen by measured times.
        start = checkpoint_path(checkpoints_folder(Path(folder) / f"{name} whole"), SAVED)
        again = small(*options, f"run_dir={folder}/{name} again", f"resume={start}")
        found[f"{name} again"] = train_on_rank(again)["model"]
    taken_over = (*RESUMED, "strategy=mesh", *TENSOR_PIPELINE, f"trainer.max_steps={STEPS}")
    checkpoint = checkpoint_path(checkpoints_folder(Path(folder) / "alone"), SAVED)
    trained = train_on_rank(small(*taken_over, f"run_dir={folder}/taken over", f"resume={checkpoint}"))
    return {**found, "taken over": trained["model"]}


def alone_until(folder: str, last: int, checkpoint: str) -> dict[str, Any]:
    options = (
        *RESUMED,
        f"run_dir={folder}",
        f"trainer.max_steps={last}",
        f"checkpoint.every_steps={SAVED}",
        "checkpoint.keep=9",
    )
    model: dict[str, Any] = train_on_rank(small(*options, f"resume={checkpoint}"))["model"]
    return model


@pytest.mark.soak
def test_a_mesh_goes_on_bit_for_bit_and_from_one_process_and_to_one(tmp_path: Path) -> None:
    expected = run_ranks(alone_until, 1, str(tmp_path / "alone"), STEPS, "never")[0]
    for rank in run_ranks(resumed, 4, str(tmp_path)):
        for name in ("layers", "stages"):
            assert all(torch.equal(tensor, rank[f"{name} again"][key]) for key, tensor in rank[f"{name} whole"].items())
        assert relative_difference(rank["taken over"], expected) <= 1e-11
    saved = checkpoint_path(checkpoints_folder(tmp_path / "stages whole"), SAVED)
    found = run_ranks(alone_until, 1, str(tmp_path / "back"), STEPS, str(saved))[0]
    assert relative_difference(found, expected) <= 1e-11


@pytest.mark.parametrize(
    ("options", "ranks", "problem"),
    [
        (
            ("strategy.mesh.data=3",),
            4,
            "strategy.mesh.data=3: with shard 1 × pipeline 1 × tensor 1 needs 3 ranks, but 4",
        ),
        (("strategy.mesh.tensor=3",), 4, "strategy.mesh=shard 1 × pipeline 1 × tensor 3: needs 3 ranks, or a multiple"),
        (("strategy.mesh.tensor=2",), 1, "strategy.mesh=shard 1 × pipeline 1 × tensor 2: needs 2 ranks, or a multiple"),
        (("strategy.mesh.pipeline=9",), 9, "strategy.mesh.pipeline=9: the model has only 4 blocks"),
        (
            ("strategy.mesh.pipeline=2", "strategy.virtual_stages=2"),
            2,
            "strategy.virtual_stages=2: is not the number of stages per rank of 1f1b",
        ),
        (
            ("strategy.mesh.pipeline=2", "strategy.schedule=interleaved_1f1b", "strategy.virtual_stages=4"),
            2,
            "strategy.mesh.pipeline=2: makes 8 stages, and the model has only 4 blocks",
        ),
        (("strategy.mesh.pipeline=2", "strategy.batchnorm=sync"), 2, "strategy.batchnorm=sync: is not possible in"),
        (
            ("strategy.mesh.pipeline=2", "strategy.last_bucket_mb=1"),
            4,
            "strategy.last_bucket_mb=1.0: is not possible in a pipeline",
        ),
        (("strategy.batchnorm=deferred",), 2, "strategy.batchnorm=deferred: is not possible without"),
        (("strategy.virtual_stages=2",), 2, "strategy.virtual_stages=2: needs strategy.mesh.pipeline above 1"),
        (("strategy.plan={head: column}",), 2, "strategy.plan={'head': 'column'}: needs strategy.mesh.tensor above 1"),
        (("strategy.mesh.shard=2", "compression=topk"), 2, "compression=topk: compresses all-reduces"),
        (("strategy.mesh.tensor=2", "compression=topk"), 2, "compression=topk: compresses gradients that replicas"),
        (("strategy.mesh.tensor=2", "compression=auto"), 4, "compression=auto: each rank chooses by what it measures"),
        (
            ("strategy.mesh.tensor=2", "strategy.mesh.pipeline=2", "strategy.plan={nothing: column}"),
            4,
            "strategy.plan=nothing: fits no layer",
        ),
        (("strategy.mesh.tensor=2", "strategy.mesh.pipeline=2", "optimizer=lamb"), 4, "optimizer.name=lamb: updates"),
    ],
)
def test_what_cannot_run_is_refused_in_a_line(options: tuple[str, ...], ranks: int, problem: str) -> None:
    world = World(rank=0, size=ranks, local_rank=0, local_size=ranks, host="here")
    with pytest.raises(ConfigError) as refused:
        check(small("strategy=mesh", *options), world)
    assert str(refused.value).startswith(problem)
