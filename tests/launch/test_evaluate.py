"""``launch/evaluate.py`` as users start it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.harness import run_ranks
from tests.trained import Refusal, launch


def test_two_ranks_write_the_same_result_as_the_training(run: Path) -> None:
    run_ranks(launch, 2, "evaluate", f"run={run}")
    summary = json.loads((run / "summary.json").read_text())
    assert json.loads((run / "evaluation_test.json").read_text())["correct"] == summary["test_correct"]


def test_wrong_settings_are_one_line_and_exit_code_2(refusal: Refusal, run: Path) -> None:
    assert refusal("evaluate").startswith("run: ")
    assert refusal("evaluate", "run=nowhere") == "run=nowhere: is not a folder"
    assert refusal("evaluate", f"run={run}", "split=tst").endswith("choices: train, val, test (did you mean test?)")
    assert refusal("evaluate", f"run={run}", "splt=val").startswith("splt: no such key; choices: run, checkpoint, ")
    assert refusal("evaluate", f"run={run}", "batch_size=0") == "batch_size=0: must be at least 1"
