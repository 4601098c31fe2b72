"""Evaluation counts every image once on any number of ranks, and writes only its own result to the run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from distrain.cli import evaluate, hydra_entry
from distrain.cli.evaluate import EvaluateSettings
from distrain.config.load import load_settings
from distrain.data.base import DataSpec, Images, Splits
from distrain.data.cifar10 import Cifar10
from distrain.errors import ConfigError
from distrain.runtime.runtime import Runtime
from distrain.tasks.classification import Classification
from distrain.training.run_plan import RunPlan
from tests.data.helpers import images_of, write_image
from tests.harness import run_ranks
from tests.runs import CONF, small
from tests.trained import change_config, replace_section, train


def configured(run: Path, *overrides: str) -> EvaluateSettings:
    return load_settings(EvaluateSettings, hydra_entry.compose(CONF, "evaluate", [f"run={run}", *overrides]))


def on_rank(configuration: EvaluateSettings) -> dict[str, Any]:
    return evaluate.run(configuration)


def files(run: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in run.rglob("*") if path.is_file()}


class NoRuntime:
    """Replaces the runtime in tests without ranks."""

    def __init__(self, *arguments: object, **options: object) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def counts(result: dict[str, Any]) -> list[tuple[int, int]]:
    return [(result["correct"], result["count"]), *((each["correct"], each["count"]) for each in result["classes"])]


def test_any_number_of_ranks_gives_the_counts_of_training(run: Path, tmp_path: Path) -> None:
    summary, before = json.loads((run / "summary.json").read_text()), files(run)
    alone = run_ranks(on_rank, 1, configured(run))[0]
    assert (alone["correct"], alone["count"]) == (summary["test_correct"], summary["test_count"])
    assert 0 < alone["correct"] < alone["count"] == 31
    assert alone["accuracy"] == summary["test_accuracy"]
    assert alone["loss"] == pytest.approx(summary["test_loss"], rel=1e-6)
    assert [each["class"] for each in alone["classes"]] == ["0", "1", "2", "3"]
    assert sum(each["correct"] for each in alone["classes"]) == alone["correct"]
    assert (alone["step"], alone["checkpoint"]) == (summary["steps"], f"step_{summary['steps']:08d}")

    result = run / "evaluation_test.json"
    assert json.loads(result.read_text()) == alone
    after = files(run)
    del after[str(result)]
    assert after == before

    for ranks in (2, 3):
        # 5 images per step: shards of 2 and 3, or 1, 2 and 2; the last batch has one image.
        options = (f"output={tmp_path}/{ranks}.json", "batch_size=5")
        shared = run_ranks(on_rank, ranks, configured(run, *options))
        assert all(counts(each) == counts(alone) for each in shared)
        assert json.loads((tmp_path / f"{ranks}.json").read_text()) == shared[0]


def test_a_run_of_ddp_with_batchnorm_is_evaluated_on_one_process(tmp_path: Path) -> None:
    folder = tmp_path / "ddp"
    options = ("strategy=ddp", "model=resnet18", "model.norm=batch", "trainer.max_steps=1", f"run_dir={folder}")
    summary = run_ranks(train, 2, small(*options))[0]
    result = run_ranks(on_rank, 1, configured(folder))[0]
    assert (result["correct"], result["count"]) == (summary["test_correct"], summary["test_count"])
    assert result["loss"] == pytest.approx(summary["test_loss"], rel=1e-5)


def test_each_split_is_evaluated_with_the_chosen_checkpoint(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    accuracies = [line["epoch/val_accuracy"] for line in lines if "epoch/val_accuracy" in line]
    first = sorted((run / "checkpoints").iterdir())[0]
    options = ("split=val", f"checkpoint={first}")
    result = run_ranks(on_rank, 1, configured(run, *options))[0]
    assert result["accuracy"] == accuracies[0]
    assert (result["checkpoint"], result["count"]) == (first.name, 5)
    assert run_ranks(on_rank, 1, configured(run, "split=train"))[0]["count"] == 48
    assert (run / "evaluation_val.json").exists()
    assert (run / "evaluation_train.json").exists()


def test_an_empty_split_is_refused(run: Path) -> None:
    change_config(run, data={"val_fraction": 0.0})
    with pytest.raises(ConfigError, match="split=val: the run has no such images; choices: train, test"):
        evaluate.run(configured(run, "split=val"))


def test_data_of_another_shape_or_other_classes_are_refused(run: Path) -> None:
    change_config(run, data={"classes": 5})
    with pytest.raises(
        ConfigError, match=r"holds 3x8x8 images of 5 classes \(0, 1, 2, 3, 4\); the run was trained on "
    ):
        evaluate.run(configured(run))


@pytest.fixture
def trees(run: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A dark and a bright image folder with the run's classes; the run's data become the dark one."""
    for name, value in (("dark", 0), ("bright", 200)):
        for part in ("train", "test"):
            for place in range(8):
                pixels = np.full((8, 8, 3), value + 5 * place, dtype=np.uint8)
                write_image(tmp_path / name / part / str(place % 4) / f"{place}.png", pixels)
    options = ("data.height=8", "data.width=8", f"data.root={tmp_path}/dark", f"data.cache={tmp_path}/dark-cache")
    replace_section(run, "data", "data=image_folder", *options)
    return tmp_path / "dark", tmp_path / "bright"


def test_moved_data_are_normalised_as_in_training(
    run: Path, trees: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    dark, bright = trees
    loaded: list[Splits] = []

    def stop(plan: RunPlan, runtime: Runtime, splits: Splits, images: Images, model: nn.Module) -> Any:
        loaded.append(splits)
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "_evaluate", stop)
    monkeypatch.setattr(evaluate, "Runtime", NoRuntime)
    for root in (dark, bright):
        with pytest.raises(KeyboardInterrupt):
            evaluate.run(configured(run, f"data_root={root}"))
    data = json.loads((run / "data.json").read_text())
    for splits in loaded:
        assert [list(splits.mean), list(splits.std)] == [data["mean"], data["std"]]
    assert images_of(loaded[0].test).max() < images_of(loaded[1].test).min()
    # Evaluation must not write to the cache that the run's configuration names.
    assert not (dark.parent / "dark-cache").exists()


def test_missing_data_are_not_downloaded_and_the_key_is_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cifar10, "_download", lambda self: pytest.fail("a run's folder made it download"))
    replace_section(run, "data", "data=cifar10", f"data.root={tmp_path}", "data.download=true")
    with pytest.raises(ConfigError, match=r"^data\.root=.*lacks .*; data_root=FOLDER names the run's data"):
        evaluate.run(configured(run))


def test_an_output_that_can_not_be_written_is_refused_at_once(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"output=nowhere/x\.json: there is no folder nowhere"):
        evaluate.run(configured(run, "output=nowhere/x.json"))


def test_the_table_has_a_line_per_class_and_no_control_characters() -> None:
    task = Classification(small(), DataSpec(3, 8, 8, ("cat", "dog")))
    classes = [
        {"class": "cat\x1b[2J", "accuracy": 0.5, "correct": 1, "count": 2},
        {"class": "dog", "accuracy": None, "correct": 0, "count": 0},
    ]
    result: dict[str, Any] = {"split": "test", "checkpoint": "step_00000001", "weights": "last"}
    result |= {"accuracy": 0.5, "correct": 1, "count": 2, "loss": 1.25}
    assert evaluate._table({**result, "classes": classes}, task).splitlines() == [
        "test of step_00000001: accuracy 0.5000 (1 of 2), loss 1.2500",
        "class    accuracy  correct  count",
        "cat\\x1b[2J    0.5000        1      2",
        "dog             -        0      0",
    ]
