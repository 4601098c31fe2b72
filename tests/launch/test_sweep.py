"""``launch/sweep.py`` as users start it, with jobs under the real torchrun."""

from __future__ import annotations

import csv
import shlex
import subprocess
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from tests.harness import HANG_SECONDS
from tests.runs import SMALL, launched

QUICK = tuple(option for option in SMALL if option != "logger=none")


def start(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return launched(folder, "sweep", *arguments, timeout=HANG_SECONDS)


def test_failed_job_is_reported_and_the_others_have_results(tmp_path: Path) -> None:
    model = (
        "model=custom",
        "model._target_=tests.tools.launching.failing_model.FailingModel",
        "+model.kwargs.behaviour=train,fail,train_too",
    )
    ended = start(tmp_path, *QUICK, *model, "trainer.max_steps=2", "sweep.folder=sweep", "sweep.parallel=2")
    assert ended.returncode == 1, ended.stderr
    with (tmp_path / "sweep" / "results.csv").open() as file:
        rows = {row["model.kwargs.behaviour"]: row for row in csv.DictReader(file)}
    assert {name: row["status"] for name, row in rows.items()} == {
        "train": "done",
        "fail": "failed",
        "train_too": "done",
    }
    assert rows["fail"]["reason"].endswith("at step 0: RuntimeError: as configured")
    # Both jobs are the same training.
    assert rows["train"]["test_loss"] == rows["train_too"]["test_loss"] != ""
    lines = ended.stdout.splitlines()
    assert {line.split()[1] for line in lines if line[:4] in ("000 ", "002 ")} == {"train", "train_too"}
    assert any(line.startswith("001_model.kwargs.behaviour=fail: failed: rank 0 on ") for line in lines)
    assert "2 of 3 jobs are done, 1 not" in lines
    # Hydra prints nothing of its own, and TensorBoard's HParams page finds each finished job.
    (line,) = ended.stderr.splitlines()
    assert line.startswith("distrain: sweep.metric=val_accuracy: is no number in the summary.json of 000_model.kwargs")
    for name in ("train", "train_too"):
        events = EventAccumulator(str(next(Path(rows[name]["folder"], "tensorboard").iterdir())))
        events.Reload()
        assert "_hparams_/session_start_info" in events.PluginTagToContent("hparams")


def test_jobs_file_is_written_and_nothing_runs(tmp_path: Path) -> None:
    ended = start(tmp_path, "strategy=ddp", "optimizer.lr=0.1,0.01", "sweep.folder=s p", "sweep.jobs_file=jobs.txt")
    assert (ended.returncode, ended.stdout) == (0, "jobs.txt: 2 jobs, one per line\n"), ended.stderr
    jobs = [shlex.split(line) for line in (tmp_path / "jobs.txt").read_text().splitlines()]
    assert jobs[0] == ["strategy=ddp", "optimizer.lr=0.1", f"run_dir='{tmp_path}/s p/000_optimizer.lr=0.1'"]
    assert jobs[1][1] == "optimizer.lr=0.01"
    assert {path.name for path in (tmp_path / "s p").glob("0*/*")} == {"overrides.txt"}


def test_wrong_settings_are_one_line_and_exit_code_2(tmp_path: Path) -> None:
    for arguments, message in {
        ("optimizer.lrr=1,2",): "distrain: optimizer.lrr: no such key; choices: name, lr",
        ("seed=1,2", "sweep.minuts=3"): "distrain: sweep.minuts: no such key; choices: sweep.folder, ",
        ("seed=1,2", "sweep.parallel=0"): "distrain: parallel=0: must be at least 1",
    }.items():
        ended = start(tmp_path, *arguments)
        assert ended.returncode == 2
        assert ended.stderr.startswith(message), ended.stderr
        assert ended.stderr.count("\n") == 1


def test_help_is_that_of_the_sweep(tmp_path: Path) -> None:
    assert "sweep.minutes=30" in start(tmp_path, "--help").stdout
