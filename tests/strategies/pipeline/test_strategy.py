"""strategy=pipeline computes what one process computes, with every schedule; other strategies load its state."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from distrain.errors import ConfigError
from distrain.runtime.world import World
from tests.harness import run_ranks, soaked
from tests.runs import ALL_AUGMENTATIONS, check, relative_difference, small, train_on_rank

CNN = ("model=cifar_cnn", "data.height=32", "data.width=32")
GROUP_NORM = ("model=custom", "model._target_=tests.runs.NormNet", "+model.kwargs.norm=group")
BATCH_NORM = ("model=custom", "model._target_=tests.runs.NormNet", "+model.kwargs.norm=batch")
#: Schedules with their stages per rank.
SCHEDULES = {"gpipe": 1, "1f1b": 1, "interleaved_1f1b": 2, "interleaved_zero_bubble": 2, "zbv_zero_bubble": 2}
#: 48 training images; batches of 12 divide by microbatches and replicas, batches of 13 leave 9, batches of 23 leave 2.
SIZES = {"divisible": ("data.batch_size=12",), "ragged": ("data.batch_size=13",), "few": ("data.batch_size=23",)}


def options(*more: str, precision: str = "fp64", steps: int = 20) -> tuple[str, ...]:
    return (
        "optimizer=sgd",
        "optimizer.lr=0.01",
        "optimizer.momentum=0.9",
        f"trainer.precision={precision}",
        f"trainer.max_steps={steps}",
        "trainer.epochs=100",
        "resume=never",
        *more,
    )


@functools.cache
def serial(folder: Path, *overrides: str) -> dict[str, Any]:
    run: dict[str, Any] = run_ranks(train_on_rank, 1, small(*overrides, f"run_dir={folder}/serial"))[0]
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipeline")


def compare_with_serial(
    folder: Path, ranks: int, common: tuple[str, ...], pipeline: tuple[str, ...], bound: float
) -> dict[str, Any]:
    expected = serial(folder, *common)
    runs = run_ranks(train_on_rank, ranks, small(*common, "strategy=pipeline", *pipeline, f"run_dir={folder}/pipeline"))
    for run in runs:
        assert relative_difference(run["model"], expected["model"]) <= bound
        for count in ("test_correct", "test_count", "samples", "steps"):
            assert run["summary"][count] == expected["summary"][count]
    first: dict[str, Any] = runs[0]
    return first


@pytest.mark.parametrize(
    "case",
    soaked(
        itertools.product(SCHEDULES, SIZES),
        [*((schedule, "ragged") for schedule in SCHEDULES), ("zbv_zero_bubble", "few")],
    ),
    ids=str,
)
def test_two_ranks_equal_one_process(case: tuple[str, str], folder: Path) -> None:
    schedule, sizes = case
    pipeline = (f"strategy.schedule={schedule}", f"strategy.stages={2 * SCHEDULES[schedule]}")
    compare_with_serial(folder, 2, options(*CNN, *SIZES[sizes]), pipeline, 1e-12)


@pytest.mark.parametrize("schedule", soaked(SCHEDULES, ("1f1b", "zbv_zero_bubble")))
def test_two_replicas_of_two_ranks_equal_one_process(schedule: str, folder: Path) -> None:
    pipeline = (f"strategy.schedule={schedule}", f"strategy.stages={2 * SCHEDULES[schedule]}")
    run = compare_with_serial(folder, 4, options(*CNN, *SIZES["ragged"]), pipeline, 1e-12)
    assert run["summary"]["mesh"] == {"data": 2, "pipeline": 2}
    assert run["summary"]["bytes_uncompressed_per_step"] > 0


@pytest.mark.parametrize("ranks", soaked([3, 4], [3]))
def test_longer_pipelines_in_float32_equal_one_process(ranks: int, folder: Path) -> None:
    compare_with_serial(
        folder, ranks, options(*CNN, *SIZES["ragged"], precision="fp32"), (f"strategy.stages={ranks}",), 1e-5
    )


def test_a_replica_without_samples_takes_part(folder: Path) -> None:
    # 48 images in batches of 47: the last batch has one sample for two replicas.
    compare_with_serial(folder, 4, options(*CNN, "data.batch_size=47"), ("strategy.stages=2",), 1e-12)


@pytest.mark.parametrize(
    "extra",
    [
        ("trainer.grad_clip_norm=0.05",),
        ("trainer.micro_batch_size=2",),
        (*ALL_AUGMENTATIONS, "optimizer.nesterov=true", "scheduler=cosine"),
    ],
    ids=["clipped over the whole model", "accumulated", "augmented, with Nesterov"],
)
def test_trainer_options_equal_one_process(extra: tuple[str, ...], folder: Path) -> None:
    compare_with_serial(folder, 2, options(*GROUP_NORM, *SIZES["ragged"], *extra), (), 1e-12)


def test_mixed_precision_is_close_to_one_process(folder: Path) -> None:
    common = options(*CNN, *SIZES["ragged"], precision="bf16")
    runs = run_ranks(train_on_rank, 2, small(*common, "strategy=pipeline", f"run_dir={folder}/bf16"))
    assert relative_difference(runs[0]["model"], serial(folder, *common)["model"]) < 0.01


def test_deferred_batch_norm_sees_the_whole_batch_once(folder: Path) -> None:
    # With a learning rate of practically 0 the statistics depend on the batches only.
    common = options(*BATCH_NORM, *SIZES["ragged"], "optimizer.lr=1e-300")
    pipeline = ("strategy.stages=2", "strategy.boundaries=[second]")
    expected = serial(folder, *common)["model"]
    run = run_ranks(train_on_rank, 2, small(*common, "strategy=pipeline", *pipeline, f"run_dir={folder}/norm"))[0]
    # The first layer's input doesn't depend on how the batch is normalised.
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        actual, expected_value = (model[f"first.1.{name}"].double() for model in (run["model"], expected))
        torch.testing.assert_close(actual, expected_value, rtol=1e-10, atol=1e-10)


def test_a_run_reports_bubble_memory_split_and_timeline(folder: Path) -> None:
    options_ = options(*CNN, *SIZES["divisible"])
    run = run_ranks(train_on_rank, 2, small(*options_, "strategy=pipeline", f"run_dir={folder}/report"))[0]
    report = run["summary"]["pipeline"]
    assert 0 < report["bubble_measured"] < 1
    assert report["bubble_equal_stages"] == pytest.approx(1 / 5)
    assert len(report["peak_activation_mb"]) == 2
    assert report["stages"][0]["blocks"][0] == "block1"
    written = Path(run["run_dir"]) / "pipeline"
    assert {path.name for path in written.iterdir()} == {"split.json", "timeline.png", "timeline.trace.json"}
    trace = json.loads((written / "timeline.trace.json").read_text())
    assert {(event["pid"], event["cat"]) for event in trace} >= {(0, "forward"), (1, "forward"), (1, "backward")}


def test_a_run_continues_under_other_strategies(tmp_path: Path) -> None:
    def train(ranks: int, steps: int, *strategy: str) -> dict[str, Any]:
        # Adam, which has the most state; a constant rate, since a scheduler would end with each part.
        common = (*CNN, "scheduler=constant", "optimizer.eps=1e-3", "trainer.precision=fp64")
        configuration = small(*common, "trainer.epochs=100", f"trainer.max_steps={steps}", *strategy)
        run: dict[str, Any] = run_ranks(train_on_rank, ranks, configuration)[0]
        return run

    expected = train(1, 12, f"run_dir={tmp_path}/whole")
    train(2, 3, "strategy=ddp", f"run_dir={tmp_path}/moved")
    train(2, 6, "strategy=pipeline", f"run_dir={tmp_path}/moved")
    train(
        4, 9, "strategy=pipeline", "strategy.schedule=zbv_zero_bubble", "strategy.stages=4", f"run_dir={tmp_path}/moved"
    )
    found = train(1, 12, f"run_dir={tmp_path}/moved")
    assert relative_difference(found["model"], expected["model"]) <= 1e-12
    assert found["summary"]["test_correct"] == expected["summary"]["test_correct"]


@pytest.mark.parametrize(
    ("overrides", "ranks", "message"),
    [
        (
            ("strategy.stages=3",),
            2,
            "strategy.stages=3: 2 ranks can't be divided into pipelines of 3",
        ),
        (("strategy.stages=2",), 1, "strategy.stages=2: one rank can't be divided into pipelines of 2"),
        (
            ("strategy.schedule=zbv_zero_bubble",),
            2,
            "strategy.stages=2: 2 stages per rank make a pipeline of a single",
        ),
        (
            ("strategy.schedule=interleaved_1f1b", "strategy.stages=5"),
            2,
            "strategy.stages=5: must be a multiple of the 2",
        ),
        (("strategy.schedule=1f1b", "strategy.virtual_stages=2"), 2, "strategy.virtual_stages=2: is not the number"),
        (("strategy.schedule=interleaved_1f1b", "strategy.virtual_stages=1"), 2, "needs at least 2"),
        (("strategy.boundaries=[nothing]",), 2, "strategy.boundaries=nothing: is no block"),
        (("trainer.compile=true",), 2, "trainer.compile=true: is not possible"),
        (("trainer.compile=max",), 2, "trainer.compile=max: is not possible"),
        (("strategy.stages=64",), 64, "strategy.stages=64: the model has only"),
        (
            ("model=custom", "model._target_=tests.strategies.pipeline.test_strategy.OneBlock"),
            2,
            "strategy.stages=2: OneBlock can be cut at 0 places only",
        ),
    ],
)
def test_configurations_that_cannot_run_are_refused(overrides: tuple[str, ...], ranks: int, message: str) -> None:
    configuration = small("data.batch_size=64", "strategy=pipeline", *overrides)
    with pytest.raises(ConfigError) as caught:
        check(configuration, World(rank=0, size=ranks, local_rank=0, local_size=ranks, host="here"))
    assert message in str(caught.value)


class OneBlock(torch.nn.Module):
    """A model that is not a sequence."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(in_channels, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits from each channel's mean."""
        logits: torch.Tensor = self.layer(images.mean((2, 3)))
        return logits
