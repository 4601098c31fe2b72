"""A model that can't run a single image is refused at the start if the sizes leave one alone, and only then."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from distrain.cli.app import train
from distrain.config.schema import Config
from distrain.data.batch import Batch
from distrain.data.sampler import shard_bounds
from distrain.errors import ConfigError
from distrain.runtime.world import World
from distrain.strategies import base as strategies
from distrain.training.run_plan import RunPlan
from tests.runs import compose


class NormOfVectors(nn.Sequential):
    """BatchNorm of one value a channel and image: a single image has no variance."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        pool = nn.Sequential(nn.Conv2d(in_channels, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        super().__init__(pool, nn.BatchNorm1d(8), nn.Linear(8, num_classes))


class Squeezes(nn.Module):
    """Logits of a single image lose their first dimension too."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, num_classes, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.conv(images).mean((2, 3)).squeeze()
        return logits


def configuration(model: str, *overrides: str) -> Config:
    return compose(
        "model=custom",
        f"model._target_=tests.training.test_batch_sizes.{model}",
        "data=synthetic",
        *("data.height=8", "data.width=8", "data.classes=4", "data.val_fraction=0", "data.test_size=16"),
        "data.eval_batch_size=8",
        "logger=none",
        *overrides,
    )


def check(config: Config, ranks: int) -> None:
    """What ``launch/train.py`` checks before ranks communicate."""
    plan = RunPlan.resolve(config, World(0, ranks, 0, ranks, "here"))
    trial = plan.check()
    plan.check_sizes(plan.source.load(), trial)


NORM, SQUEEZES = "NormOfVectors", "Squeezes"
BATCH, EVAL = "data.batch_size", "data.eval_batch_size"
PIPELINE = ("strategy=pipeline", "strategy.stages=2")
#: Model, overrides, number of ranks, the key that the line names (none: it is trained).
SIZES: dict[str, tuple[str, tuple[str, ...], int, str | None]] = {
    "41 in batches of 8": (NORM, ("data.train_size=41", "data.batch_size=8"), 1, BATCH),
    "40 in batches of 8": (NORM, ("data.train_size=40", "data.batch_size=8"), 1, None),
    "42 in batches of 8": (NORM, ("data.train_size=42", "data.batch_size=8"), 1, None),
    "batches of 1": (NORM, ("data.train_size=16", "data.batch_size=1"), 1, BATCH),
    "the run ends before the last batch": (
        NORM,
        ("data.train_size=41", "data.batch_size=8", "trainer.max_steps=5"),
        1,
        None,
    ),
    "validation may be of one": (
        NORM,
        ("data.train_size=41", "data.val_fraction=0.025", "data.batch_size=8"),
        1,
        None,
    ),
    "pieces of 3 of 7": (
        NORM,
        ("data.train_size=56", "data.batch_size=7", "trainer.micro_batch_size=1"),
        1,
        BATCH,
    ),
    "shares of one, local": (
        NORM,
        ("data.train_size=48", "data.batch_size=3", "strategy=ddp", "strategy.batchnorm=local"),
        2,
        BATCH,
    ),
    "shares of one, together": (NORM, ("data.train_size=48", "data.batch_size=3", "strategy=ddp"), 2, None),
    "one left of all": (NORM, ("data.train_size=41", "data.batch_size=8", "strategy=ddp"), 2, BATCH),
    "local SGD": (NORM, ("data.train_size=48", "data.batch_size=3", "strategy=local_sgd"), 2, BATCH),
    "workers of a server": (
        NORM,
        ("data.train_size=48", "data.batch_size=3", "strategy=parameter_server"),
        3,
        BATCH,
    ),
    "microbatches of one": (NORM, (*PIPELINE, "data.train_size=48", "data.batch_size=4"), 2, BATCH),
    "microbatches of two": (NORM, (*PIPELINE, "data.train_size=48", "data.batch_size=8"), 2, None),
    "a last microbatch of one": (
        NORM,
        (*PIPELINE, "data.train_size=45", "data.batch_size=8"),
        2,
        BATCH,
    ),
    "17 to test on": (SQUEEZES, ("data.train_size=16", "data.batch_size=8", "data.test_size=17"), 1, EVAL),
    "16 to test on": (SQUEEZES, ("data.train_size=16", "data.batch_size=8"), 1, None),
    "a share of one to test on": (
        SQUEEZES,
        ("data.train_size=16", "data.batch_size=8", "data.test_size=19", "strategy=ddp"),
        2,
        EVAL,
    ),
    "one to validate on": (
        SQUEEZES,
        ("data.train_size=41", "data.val_fraction=0.025", "data.batch_size=8"),
        1,
        EVAL,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SIZES)
def test_a_single_image_that_the_model_can_not_run_is_known_at_the_start(case: str) -> None:
    model, overrides, ranks, key = SIZES[case]
    config = configuration(model, *overrides)
    if key is None:
        check(config, ranks)
        return
    with pytest.raises(ConfigError) as caught:
        check(config, ranks)
    line = str(caught.value)
    assert line.startswith(f"{key}=")
    assert "a single one is left for a forward pass" in line
    suggested = line.rpartition("; ")[2]
    if suggested.endswith(" leaves none alone"):
        check(configuration(model, *overrides, suggested.removesuffix(" leaves none alone")), ranks)
    else:
        assert case in ("pieces of 3 of 7", "one to validate on")


def test_what_is_accepted_is_trained_to_the_end(tmp_path: Path) -> None:
    sizes = ("data.train_size=41", "data.batch_size=9", "trainer.epochs=2")
    assert train(configuration(NORM, *sizes, f"run_dir={tmp_path}"))["epochs"] == 2


@pytest.mark.parametrize("strategy", ["single", "ddp", "local_sgd", "parameter_server", "pipeline"])
def test_sizes_are_those_that_the_strategy_makes(strategy: str) -> None:
    draw = random.Random(0)
    options = [f"strategy={strategy}", *(["strategy.stages=2"] if strategy == "pipeline" else [])]
    composed = configuration(SQUEEZES, *options)
    for _ in range(100):
        ranks = {"single": 1, "pipeline": 2 * draw.randint(1, 3)}.get(strategy, draw.randint(2, 5))
        count, micro, training = draw.randint(1, 30), draw.choice([None, 1, 2, 5]), draw.random() < 0.5
        config = replace(composed, trainer=replace(composed.trainer, micro_batch_size=micro))
        if strategy == "pipeline":
            config.strategy.microbatches = draw.randint(1, 6)  # type: ignore[attr-defined]
        chosen = strategies.strategy_class(config)
        found = chosen.forward_sizes(config, ranks, count, training=training)
        shards = chosen.data_parallel_size(config, ranks)
        assert len(found) == shards
        for index, sizes in enumerate(found):
            start, end = shard_bounds(count, index, shards)
            share = Batch(torch.zeros(end - start, 1), torch.zeros(end - start), torch.arange(start, end), count)
            assert sizes == [len(inputs) for inputs, _ in share.split(len(sizes))]
            if micro is not None and (training or strategy == "pipeline"):
                assert max(sizes) <= micro
