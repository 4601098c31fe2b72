"""``model.checkpoint_activations`` trains the same parameters, bit for bit, under every strategy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from distrain.errors import ConfigError, Failed
from distrain.runtime.world import World
from tests.harness import run_ranks
from tests.runs import check, relative_difference, small, train_on_rank

ALONE = World(0, 1, 0, 1, "host")
NETS = "tests.strategies.recomputation.networks"
SEQUENCE = ("model=custom", f"model._target_={NETS}.DropoutNet")
LAYERS = ("model=custom", f"model._target_={NETS}.LayersNet")
TRANSFORMER = ("model=custom", "model._target_=tests.strategies.fsdp.models.Transformer")
#: 47 images: the last batch has one image, so that two of three ranks have none.
COMMON = ("trainer.max_steps=3", "trainer.epochs=9", "data.batch_size=23", "resume=never")
FULL = ("strategy=fsdp", "strategy.shard=full", "strategy.block_mb=1e-4")
PIPELINE = ("strategy=pipeline", "strategy.microbatches=3")
#: Boundaries that are chosen by measured times may differ between two runs, and dropout draws anew in each stage.
TWO_STAGES = ("strategy.stages=2", "strategy.boundaries=[second]")
FOUR_STAGES = ("strategy.stages=4", "strategy.boundaries=[layers.0,layers.1,layers.2]")
#: By number of ranks: ways of training, and the values of the key that are compared with ``none``.
WAYS: dict[int, list[tuple[tuple[str, ...], tuple[str, ...]]]] = {
    1: [
        (SEQUENCE, ("all", "2")),
        ((*LAYERS, "trainer.micro_batch_size=7", "optimizer=sgd", "optimizer.sam_rho=0.05"), ("all",)),
        ((*TRANSFORMER, "trainer.precision=bf16"), ("all",)),
    ],
    2: [
        ((*TRANSFORMER, *FULL), ("all",)),
        ((*SEQUENCE, *FULL, "freeze=[{match: second.*}]"), ("2",)),
        ((*SEQUENCE, *PIPELINE, "strategy.schedule=1f1b", *TWO_STAGES), ("all",)),
        ((*LAYERS, *PIPELINE, "strategy.schedule=zbv_zero_bubble", *FOUR_STAGES), ("all",)),
        ((*SEQUENCE, "strategy=local_sgd", "strategy.sync_every=2"), ("all",)),
        ((*SEQUENCE, "strategy=tensor_parallel", "trainer.micro_batch_size=7"), ("all",)),
    ],
    3: [
        ((*SEQUENCE, "strategy=ddp", "strategy.bucket_mb=1e-3"), ("all",)),
        ((*SEQUENCE, *FULL, "trainer.micro_batch_size=5"), ("all",)),
        ((*LAYERS, "strategy=parameter_server"), ("all",)),
    ],
}


def train_each(ranks: int, folder: str) -> list[list[dict[str, Any]]]:
    """Trains each way with each value in the same processes, because processes are slow to start."""
    return [
        [
            train_on_rank(
                small(*COMMON, *way, f"model.checkpoint_activations={value}", f"run_dir={folder}/{index}_{value}")
            )
            for value in ("none", *values)
        ]
        for index, (way, values) in enumerate(WAYS[ranks])
    ]


@pytest.mark.parametrize("ranks", WAYS)
def test_the_same_parameters_bit_for_bit(ranks: int, tmp_path: Path) -> None:
    found = run_ranks(train_each, ranks, ranks, str(tmp_path))[0]
    for (way, _), (plain, *others) in zip(WAYS[ranks], found, strict=True):
        for other in others:
            assert relative_difference(other["model"], plain["model"]) == 0, way
            assert other["summary"]["test_loss"] == plain["summary"]["test_loss"]


def test_auto_keeps_the_limit_and_says_what_it_chose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def train(*overrides: str) -> tuple[dict[str, Any], float]:
        sizes = ("data.height=32", "data.width=32", f"run_dir={tmp_path / str(len(overrides))}")
        run = train_on_rank(small(*COMMON, *SEQUENCE, *sizes, *overrides))
        return run, sum(run["summary"]["memory_by_kind_mb"]["measured"].values())

    plain, needed = train()
    limited, taken = train("model.checkpoint_activations=auto", f"runtime.memory_limit_mb={0.7 * needed}")
    assert taken <= 0.7 * needed
    assert relative_difference(limited["model"], plain["model"]) == 0
    said = capsys.readouterr().err
    assert "of 3 blocks are computed again" in said
    with pytest.raises(Failed):
        train("model.checkpoint_activations=auto", "runtime.memory_limit_mb=0.5", "seed=1")
    line = r"ConfigError: model.checkpoint_activations=auto: rank 0 on \S+ needs .* even if all blocks are computed"
    assert re.search(line, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("overrides", "line"),
    {
        ("model.checkpoint_activations=some",): "model.checkpoint_activations=some: is neither a whole number nor one",
        ("model.checkpoint_activations=0",): "model.checkpoint_activations=0: must be at least 1",
        ("model.checkpoint_activations=all", "trainer.compile=true"): "trainer.compile=true: torch.compile chooses",
        (
            "model.checkpoint_activations=auto",
            "trainer.micro_batch_size=auto",
        ): "model.checkpoint_activations=auto: trainer.micro_batch_size=auto is chosen by the same memory",
        ("trainer.micro_batch_size=auto", "trainer.compile=true"): "trainer.micro_batch_size=auto: trainer.compile",
        ("trainer.micro_batch_size=many",): "trainer.micro_batch_size=many: is neither a whole number nor one",
    }.items(),
)
def test_what_cannot_be_is_refused_in_one_line(overrides: tuple[str, ...], line: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check(small(*overrides), ALONE)
    assert str(refused.value).startswith(line)
