"""Evaluation counts every sample once, in integers, for any batch size and number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distrain.communication.collectives import Communicator
from distrain.data.base import DataSpec, Images
from distrain.data.loader import Loader
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.strategies.base import Strategy
from distrain.tasks.base import Evaluation
from distrain.tasks.classification import Classification
from distrain.training.evaluation import evaluate
from tests.harness import run_ranks
from tests.runs import small
from tests.strategies.helpers import set_up, single

CLASSES = 4
COUNT = 31
WATCHED = (30, 0, 17, 7)

TASK = Classification(small(), DataSpec(3, 2, 2, tuple(map(str, range(CLASSES)))))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, CLASSES, dtype=torch.float64))


def split() -> Images:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (COUNT, 3, 2, 2), generator=generator, dtype=torch.uint8)
    # The last class is never true.
    return Images(images, torch.randint(CLASSES - 1, (COUNT,), generator=generator))


def loader(batch_size: int, shard: tuple[int, int]) -> Loader:
    return Loader(
        split(),
        batch_size=batch_size,
        shard=shard,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        device=torch.device("cpu"),
        dtype=torch.float64,
        memory_format=torch.contiguous_format,
    )


def run(strategy: Strategy, batch_size: int, communicator: Communicator) -> Evaluation:
    return evaluate(strategy, TASK, loader(batch_size, strategy.data_shard), communicator, WATCHED)


def brute_force() -> dict[str, Any]:
    """The expected result, computed sample by sample."""
    network, samples = model().eval(), split()
    confusion: list[list[int]] = [[0] * CLASSES for _ in range(CLASSES)]
    loss, guesses = 0.0, []
    for image, label in zip(samples.images, samples.targets, strict=True):
        logits: Tensor = network(((image.double() / 255 - 0.5) / 0.25).unsqueeze(0)).detach()
        loss += float(F.cross_entropy(logits, label.unsqueeze(0)))
        guesses.append(int(logits.argmax()))
        confusion[int(label)][guesses[-1]] += 1
    return {
        "loss": loss / COUNT,
        "correct": sum(confusion[i][i] for i in range(CLASSES)),
        "confusion": confusion,
        "watched": [guesses[i] for i in WATCHED],
    }


def assert_matches_brute_force(evaluation: Evaluation) -> None:
    expected = brute_force()
    assert evaluation.count == COUNT
    assert evaluation.metrics["correct"] == expected["correct"]
    assert evaluation.metrics["accuracy"] == expected["correct"] / COUNT
    assert evaluation.state["confusion"].tolist() == expected["confusion"]
    assert evaluation.watched is not None
    assert evaluation.watched.tolist() == expected["watched"]
    assert evaluation.loss == pytest.approx(expected["loss"], rel=1e-12)


@pytest.mark.parametrize("batch_size", [1, 7, 31, 1000])
def test_one_process_matches_brute_force(batch_size: int) -> None:
    assert_matches_brute_force(run(single(model(), "trainer.precision=fp64"), batch_size, Communicator()))


def test_without_watched_samples_no_decisions_are_returned() -> None:
    strategy = single(model(), "trainer.precision=fp64")
    evaluation = evaluate(strategy, TASK, loader(7, (0, 1)), Communicator())
    assert evaluation.watched is not None
    assert evaluation.watched.tolist() == []
    assert int(evaluation.state["confusion"].sum()) == COUNT


def on_each_rank(folder: Path) -> list[Evaluation]:
    config = small("strategy=ddp", "trainer.precision=fp64", f"run_dir={folder}")
    with Runtime(config, World.from_environment()) as runtime:
        strategy = set_up(model(), config, runtime)
        # The last batch of 7 leaves 3 samples; of 30, one, so that two ranks have none.
        return [run(strategy, batch_size, runtime.communicator()) for batch_size in (7, 30, 1000)]


def test_three_ranks_match_brute_force(tmp_path: Path) -> None:
    for rank in run_ranks(on_each_rank, 3, tmp_path):
        for evaluation in rank:
            assert_matches_brute_force(evaluation)
