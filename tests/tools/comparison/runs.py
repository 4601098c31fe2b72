"""Run folders that the tests of comparisons write by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from distrain.tools.comparison.differences import name_runs
from distrain.tools.comparison.run import Run, read_run
from distrain.tools.comparison.run_files import find_runs

CONFIG = {"strategy": {"name": "ddp"}, "compression": {"name": "none"}, "optimizer": {"lr": 0.1}, "seed": 0}
SUMMARY = {
    "strategy": "ddp",
    "world_size": 2,
    "compression": "none",
    "epochs": 2,
    "steps": 40,
    "resumed_at_step": 0,
    "train_loss": 0.2,
    "val_accuracy": 0.8,
    "best_val_accuracy": 0.9,
    "test_accuracy": 0.85,
    "test_loss": 0.5,
    "test_count": 100,
    "images_per_second": 1000.0,
    "step_ms": {"mean": 10.0},
    "time_share": {"compute": 0.5, "communication": 0.3, "data": 0.1, "other": 0.1},
    "bytes_sent_per_step": 2000,
    "bytes_uncompressed_per_step": 4000,
    "compression_ratio": 2.0,
    "peak_memory_mb": 100.0,
    "wall_seconds": 1.5,
    "parameters": {"count": 5000, "trainable": 5000},
    "command": "distrain train",
    "end": "2026-11-29T04:00:00+00:00",
    "versions": {"torch": "2.13.0"},
}


def step_row(step: int, loss: float | None, **more: Any) -> dict[str, Any]:
    return {"kind": "step", "step": step, "time": 1.8e9 + step, "train/loss": loss, "speed/step_ms": 10.0, **more}


def epoch_row(step: int, accuracy: float, loss: float) -> dict[str, Any]:
    values = {"epoch/train_loss": loss, "epoch/val_loss": loss, "epoch/val_accuracy": accuracy}
    return {"kind": "epoch", "step": step, "time": 1.8e9 + step, **values}


ROWS = (
    step_row(10, 1.0),
    step_row(20, 0.5),
    epoch_row(20, 0.9, 0.6),
    step_row(30, 0.3),
    step_row(40, 0.2),
    epoch_row(40, 0.8, 0.7),
)


def write_run(
    folder: Path,
    *,
    config: Mapping[str, Any] | None = CONFIG,
    summary: Mapping[str, Any] | None = SUMMARY,
    rows: Sequence[Mapping[str, Any]] | None = ROWS,
    failure: Mapping[str, Any] | None = None,
    stopped: Mapping[str, Any] | None = None,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "logs").mkdir(exist_ok=True)
    if config is not None:
        (folder / "config.yaml").write_text(
            yaml.safe_dump({**config, "run_dir": str(folder)}, allow_unicode=True, sort_keys=False)
        )
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    if rows is not None:
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for name, report in (("failure.json", failure), ("stopped.json", stopped)):
        if report is not None:
            (folder / name).write_text(json.dumps(report))
    return folder


def read(*folders: Path) -> list[Run]:
    runs = [read_run(files) for files in find_runs([str(folder) for folder in folders]).runs]
    name_runs(runs)
    return runs
