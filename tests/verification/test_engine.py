"""Certificates of small trainings on ranks of the harness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.harness import soaked
from tests.runs import ALL_AUGMENTATIONS
from tests.verification.helpers import verified

NORM_NET = ("model=custom", "model._target_=tests.runs.NormNet")
TANH_NET = ("model=custom", "model._target_=tests.verification.planted.Net", "+model.kwargs.suspect=Plain")
EVERYTHING = ("compression=topk", "compression.density=1", "compression.values=full")
BATCHNORM = (*NORM_NET, "+model.kwargs.norm=batch")
MESH = ("strategy=mesh", "strategy.microbatches=3")
DATA_TENSOR = (*MESH, "strategy.mesh.data=2", "strategy.mesh.tensor=2")
#: Ways of training that equal one process: ranks, and settings.
LOSSLESS: dict[str, tuple[int, tuple[str, ...]]] = {
    "three ranks, accumulation, clipping": (
        3,
        ("strategy=ddp", "trainer.micro_batch_size=2", "trainer.grad_clip_norm=0.1", "optimizer=sgd"),
    ),
    "augmentation": (2, ("strategy=ddp", *ALL_AUGMENTATIONS)),
    "synchronised batch norm": (2, ("strategy=ddp", *BATCHNORM)),
    "pipeline": (2, ("strategy=pipeline", "strategy.stages=2", "strategy.microbatches=3")),
    "replicated pipeline": (4, ("strategy=pipeline", "strategy.stages=2", "strategy.microbatches=3")),
    "parameter server": (3, ("strategy=parameter_server",)),
    "local SGD that merges after each step": (
        2,
        ("strategy=local_sgd", "strategy.sync_every=1", "strategy.warmup_steps=0", "optimizer=sgd"),
    ),
    "bf16": (2, ("strategy=ddp", "trainer.precision=bf16")),
    "fp16": (2, ("strategy=ddp", "trainer.precision=fp16")),
    "bf16, residual network": (2, ("strategy=ddp", "trainer.precision=bf16", "model=resnet18")),
    "bf16, group norm": (3, ("strategy=ddp", "trainer.precision=bf16", *NORM_NET, "+model.kwargs.norm=group")),
    "fp16, synchronised batch norm": (2, ("strategy=ddp", "trainer.precision=fp16", *BATCHNORM)),
    "bf16 without ReLU, pipeline": (
        2,
        ("strategy=pipeline", "strategy.stages=2", "strategy.microbatches=2", "trainer.precision=bf16", *TANH_NET),
    ),
    "interleaved pipeline": (
        2,
        ("strategy=pipeline", "strategy.stages=4", "strategy.schedule=interleaved_1f1b", "strategy.microbatches=4"),
    ),
    "a pipeline without replicas, which compresses nothing": (
        2,
        ("strategy=pipeline", "strategy.stages=2", "compression=bf16"),
    ),
    "balanced classes": (2, ("strategy=ddp", "data.balance=sampler")),
    "frozen at first": (2, ("strategy=ddp", "freeze=[{match: head, epochs: 0}, {match: '*', epochs: 1}]")),
    "group norm, momentum, cosine": (
        2,
        ("strategy=ddp", *NORM_NET, "+model.kwargs.norm=group", "optimizer=sgd", "scheduler=cosine"),
    ),
    "tied parameters": (2, ("strategy=ddp", "model=custom", "model._target_=tests.verification.planted.Tied")),
    "a data set of one's own": (
        2,
        (
            "strategy=ddp",
            "data=custom",
            "data._target_=tests.verification.planted.Samples",
            "data.workers=0",
            "data.batch_size=10",
        ),
    ),
    "two servers, clipping": (4, ("strategy=parameter_server", "strategy.servers=2", "trainer.grad_clip_norm=0.1")),
    "one worker": (2, ("strategy=parameter_server",)),
    "topk of everything, two servers": (4, ("strategy=parameter_server", "strategy.servers=2", *EVERYTHING)),
    "topk of everything": (3, ("strategy=ddp", *EVERYTHING)),
    "randomk of everything": (2, ("strategy=ddp", "compression=randomk", "compression.density=1")),
    "a compressor that may lose nothing": (2, ("strategy=ddp", "compression=auto", "compression.most_lossy=none")),
    "batches smaller than the ranks' pieces": (3, ("strategy=ddp", "data.batch_size=4", "trainer.micro_batch_size=1")),
    "flipped views, smoothed labels": (
        2,
        ("strategy=ddp", "trainer.test_views=flip", "loss.label_smoothing=0.1", "optimizer=adamw"),
    ),
    "muon": (2, ("strategy=ddp", "optimizer=muon")),
    "lookahead": (2, ("strategy=ddp", "optimizer.lookahead.every=3")),
    "replicas of divided layers, synchronised batch norm": (4, (*DATA_TENSOR, *BATCHNORM, "optimizer=sgd")),
    "divided layers of stages": (4, (*MESH, "strategy.mesh.pipeline=2", "strategy.mesh.tensor=2")),
    "shards of stages": (4, (*MESH, "strategy.mesh.shard=2", "strategy.mesh.pipeline=2", "strategy.shard=gradients")),
    "stages of divided layers without replicas, which compress nothing": (
        4,
        (*MESH, "strategy.mesh.pipeline=2", "strategy.mesh.tensor=2", "compression=bf16"),
    ),
}
#: Ways that don't, and what their statement begins with.
OTHERS: dict[str, tuple[int, tuple[str, ...]]] = {
    "compression=topk": (2, ("strategy=ddp", "compression=topk")),
    "compression=bf16": (4, ("strategy=pipeline", "strategy.stages=2", "compression=bf16")),
    "compression=fp16": (4, (*DATA_TENSOR, "compression=fp16")),
    "strategy=local_sgd": (2, ("strategy=local_sgd",)),
    "strategy=parameter_server, mode=async": (3, ("strategy=parameter_server", "strategy.mode=async")),
}


def verdicts(content: dict[str, Any], precision: str) -> dict[str, dict[str, Any]]:
    """The rows of a phase by quantity."""
    phase = next(phase for phase in content["phases"] if phase["precision"] == precision)
    return {row["quantity"]: row for row in phase["verdicts"]}


def test_ddp_is_certified_in_float64_and_in_its_own_precision(tmp_path: Path) -> None:
    content, text = verified(tmp_path, 2, "strategy=ddp", steps=4)
    assert content["verdict"] == "equal", text
    assert text.startswith("EQUAL: ddp on 2 ranks")
    assert [phase["precision"] for phase in content["phases"]] == ["fp64", "fp32"]
    for phase in content["phases"]:
        assert phase["resumed_from"] == 3
        assert phase["resumed_bitwise"]
    rows = verdicts(content, "fp64")
    for quantity in ("sample order", "sample content", "loss", "gradients", "parameters", "evaluation loss"):
        assert rows[quantity]["compared"] > 0
    # Real differences, not a comparison of a run with itself.
    assert 0 < rows["gradients"]["largest"]["value"] <= rows["gradients"]["limit"] < 1e-12
    assert content["bytes_per_step"]["all_reduce"] > 0
    assert (tmp_path / "certificate.json").exists()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("way", soaked(LOSSLESS, always=("one worker",)))
def test_lossless_ways_are_certified(way: str, tmp_path: Path) -> None:
    ranks, keys = LOSSLESS[way]
    # With 3 steps the resumed run has one: a server that were recorded too late would have none.
    content, text = verified(tmp_path, ranks, *keys, steps=3 if way == "one worker" else 6)
    assert content["verdict"] == "equal", text
    assert all(phase["resumed_bitwise"] for phase in content["phases"]), text


@pytest.mark.soak
def test_updates_that_fp16_skips_are_skipped_in_all_runs(tmp_path: Path) -> None:
    keys = ("model=custom", "model._target_=tests.verification.planted.Net", "+model.kwargs.suspect=LoudGradient")
    options = ("trainer.precision=fp16", "optimizer=sgd", "optimizer.lr=1e-4")
    content, text = verified(tmp_path, 2, "strategy=ddp", *keys, *options, steps=6, float64=False)
    assert content["verdict"] == "equal", text
    assert "fp16: updates left out in all runs, since the gradient of one process overflows: step 1, 2" in text
    rows = verdicts(content, "fp16")
    assert 0 < rows["gradients"]["compared"] < rows["parameters"]["compared"] == 6


@pytest.mark.soak
@pytest.mark.parametrize("way", OTHERS)
def test_what_is_lossy_by_design_gets_a_statement_of_its_own(way: str, tmp_path: Path) -> None:
    ranks, keys = OTHERS[way]
    content, text = verified(tmp_path, ranks, *keys, steps=6)
    assert content["verdict"] == "different by design", text
    assert content["passed"]
    assert content["statement"][0].startswith(way)
    # Ranks that hold parts of parameters have no copy of the model.
    assert len(content["measured"]) == (2 if "mesh" in content["choices"]["strategy"] else 3)
    assert content["parting"] is None
    rows = verdicts(content, "fp32")
    assert rows["parameters"]["largest"]["value"] > rows["parameters"]["limit"]
    assert rows["sample order"]["largest"]["value"] == 0


@pytest.mark.soak
def test_another_computation_is_not_certified(tmp_path: Path) -> None:
    content, text = verified(tmp_path, 2, "strategy=ddp", "strategy.batchnorm=local", *BATCHNORM, steps=4)
    assert content["verdict"] == "different", text
    assert (content["parting"]["precision"], content["parting"]["step"]) == ("fp64", 1)
    assert content["parting"]["quantity"] == "loss"
