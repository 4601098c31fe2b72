"""What tests of resuming share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distrain.runtime.runtime import Runtime
from tests.runs import check, small, trainer_for
from tests.strategies.helpers import ALONE


def log_of(folder: Path) -> str:
    return (folder / "logs" / "rank_0.log").read_text()


class Run:
    """A run of one process and its folder."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.folder = folder
        configuration = small(f"run_dir={folder}", "trainer.log_every_steps=2", *overrides)
        check(configuration, ALONE)
        with Runtime(configuration, ALONE) as runtime:
            trainer = trainer_for(configuration, runtime)
            self.summary = trainer.fit()
        self.progress = trainer.progress

    def checkpoint(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step_{step:08d}"

    def rows(self, kind: str) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [row for row in rows if row["kind"] == kind]
