"""Status files that the tests write by hand."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from distrain.health.process import PlacedProcess, Process
from distrain.health.run_status import RankStatus, RunStatus
from distrain.tools.comparison.run_files import find_runs
from distrain.tools.watching.job import Job, JobReader
from tests.tools.comparison.runs import write_run

#: When status files were written, by their own account; :func:`write_job` moves it to the present.
NOW = 1.8e9
#: No process has so large a number.
GONE = Process(2**31, 1)
#: Another host.
ELSEWHERE = PlacedProcess(GONE, "another boot", "")


def rank(number: int, **changes: Any) -> RankStatus:
    return dataclasses.replace(
        RankStatus(number, f"host{number}", "training", 20, 4.0, 0.5, 0.2, has_left=False), **changes
    )


def status(**changes: Any) -> RunStatus:
    made = RunStatus(
        7,
        NOW,
        NOW - 3000,
        running=True,
        host="host0",
        writer=PlacedProcess.current(),
        ranks=[rank(0), rank(1), rank(2)],
        step_limit=600.0,
        setup_limit=300.0,
        epoch=1,
        epochs=3,
        step=20,
        total_steps=60,
        training_seconds=10.0,
        values={"train/loss": 0.5, "train/accuracy": 0.75, "speed/step_ms": 250.0, "speed/images_per_second": 128.0},
        epoch_values={"epoch/val_loss": 0.6, "epoch/val_accuracy": 0.7},
    )
    return dataclasses.replace(made, **changes)


def write_job(folder: Path, content: RunStatus | str | None, **reports: Any) -> Path:
    """A run's folder with ``status.json``; without a summary unless one is given."""
    write_run(folder, **{"summary": None, **reports})
    if content is not None:
        if isinstance(content, RunStatus):
            late = time.time() - NOW
            content = json.dumps(
                dataclasses.replace(content, time=content.time + late, started=content.started + late).to_json()
            )
        (folder / "status.json").write_text(content)
    return folder


def reader(folder: Path) -> JobReader:
    (files,) = find_runs([str(folder)]).runs
    return JobReader(folder.name, files)


def read(folder: Path) -> Job:
    return reader(folder).read()
