"""Evaluation counts every image once, on any number of ranks, and changes nothing in the run but its own result."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distrain import cli
from distrain.commands import evaluate, settings
from distrain.commands.evaluate import EvaluateSettings
from distrain.config import ConfigError
from distrain.data.cifar10 import Cifar10
from tests.data.helpers import write_image
from tests.harness import run_ranks
from tests.runs import CONF, small
from tests.trained import change_config, train


def configured(run: Path, *overrides: str) -> EvaluateSettings:
    return settings.load(EvaluateSettings, cli.compose(CONF, "evaluate", [f"run={run}", *overrides]))


def on_rank(configuration: EvaluateSettings) -> dict[str, Any]:
    return evaluate.run(configuration)


def files(run: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in run.rglob("*") if path.is_file()}


def counts(result: dict[str, Any]) -> list[tuple[int, int]]:
    return [(result["correct"], result["count"]), *((each["correct"], each["count"]) for each in result["classes"])]


def test_any_number_of_ranks_counts_what_training_counted(run: Path, tmp_path: Path) -> None:
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
        # 5 a step: shards of 2 and 3, or 1, 2 and 2, and a last batch of a single image.
        options = (f"output={tmp_path}/{ranks}.json", "batch_size=5")
        shared = run_ranks(on_rank, ranks, configured(run, *options))
        assert all(counts(each) == counts(alone) for each in shared)
        assert json.loads((tmp_path / f"{ranks}.json").read_text()) == shared[0]


def test_a_run_of_another_strategy_with_batchnorm(tmp_path: Path) -> None:
    folder = tmp_path / "ddp"
    options = ("strategy=ddp", "model=resnet18", "model.norm=batch", "trainer.max_steps=2", f"run_dir={folder}")
    summary = run_ranks(train, 2, small(*options))[0]
    result = run_ranks(on_rank, 1, configured(folder))[0]
    assert (result["correct"], result["count"]) == (summary["test_correct"], summary["test_count"])
    assert result["loss"] == pytest.approx(summary["test_loss"], rel=1e-5)


def test_each_split_from_the_chosen_checkpoint(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    accuracies = [line["epoch/val_accuracy"] for line in lines if "epoch/val_accuracy" in line]
    first = sorted((run / "checkpoints").iterdir())[0]
    options = ("split=val", f"checkpoint={first}")
    result = run_ranks(on_rank, 1, configured(run, *options))[0]
    assert result["accuracy"] == accuracies[0]
    assert (result["checkpoint"], result["count"]) == (first.name, 6)
    assert run_ranks(on_rank, 1, configured(run, "split=train"))[0]["count"] == 47
    assert (run / "evaluation_val.json").exists()
    assert (run / "evaluation_train.json").exists()


def test_an_empty_split_is_refused(run: Path) -> None:
    change_config(run, data={"val_fraction": 0.0})
    with pytest.raises(ConfigError, match="split=val: the run has no such images; choices: train, test"):
        evaluate.run(configured(run, "split=val"))


def test_other_data_than_the_runs_is_refused(run: Path) -> None:
    change_config(run, data={"classes": 5})
    with pytest.raises(ConfigError, match=r"holds 3x8x8 images of 5 classes \(0, 1, 2, 3, 4\); the run was trained on "):
        evaluate.run(configured(run))


def folder_run(run: Path, root: Path) -> None:
    """Makes it a run on an image folder of the same classes."""
    data = dataclasses.asdict(small("data=image_folder", "data.height=8", "data.width=8", f"data.root={root}").data)
    change_config(run, data={key: None for key in ("classes", "noise")})
    content = (run / "config.yaml").read_text()
    import yaml

    whole = yaml.safe_load(content)
    whole["data"] = data
    (run / "config.yaml").write_text(yaml.safe_dump(whole))


def tree(root: Path, value: int) -> None:
    for part in ("train", "test"):
        for label in range(4):
            for i in range(2):
                pixels = np.full((8, 8, 3), value + 9 * label + i, dtype=np.uint8)
                write_image(root / part / str(label) / f"{i}.png", pixels)
