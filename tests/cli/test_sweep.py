"""How the command line of a sweep is translated into Hydra's."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from distrain.cli import sweep
from distrain.cli.sweep import SweepSettings
from distrain.errors import ConfigError
from distrain.tools.launching.jobs import DONE, Job, JobResult
from tests.config.test_conf import keys_of
from tests.runs import CONF


def test_nproc_and_sweep_keys_go_to_the_launcher_and_the_rest_to_the_trainings() -> None:
    arguments = ["strategy=ddp", "nproc=2", "sweep.minutes=3", "sweep.folder=there", "compression=none,fp16"]
    assert sweep.multirun_arguments(arguments, "it's here") == [
        "--multirun",
        "hydra/launcher=torchrun",
        "hydra.sweep.dir='it\\'s here'",
        "strategy=ddp",
        "hydra.launcher.nproc=2",
        "hydra.launcher.minutes=3",
        "hydra.sweep.dir=there",
        "compression=none,fp16",
    ]


def test_home_folder_is_expanded_in_the_sweeps_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    translated = sweep.multirun_arguments(["sweep.folder=~/a=b"], "here")
    assert translated[-1] == "hydra.sweep.dir='/home/me/a=b'"


def test_unknown_key_of_a_sweep_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^sweep.minuts: no such key; .*did you mean sweep.minutes"):
        sweep.multirun_arguments(["sweep.minuts=3"], "here")


def test_jobs_without_the_number_that_ranks_them_are_named() -> None:
    job = Job("0_sgd", {}, (), Path("there"))
    result = JobResult(job, DONE, summary={"val_accuracy": None, "test_accuracy": 0.5, "test_loss": 1.5, "steps": 3})
    assert sweep.no_metric("val_accuracy", [result, result]) == (
        "sweep.metric=val_accuracy: is no number in the summary.json of 0_sgd, 0_sgd "
        "(no validation without an epoch's end, or with data.val_fraction=0), so the sweep fails; "
        "choices: test_accuracy, test_loss (did you mean test_accuracy?)"
    )


def test_launchers_file_has_each_key_of_its_schema() -> None:
    content = yaml.safe_load((CONF / "hydra" / "launcher" / "torchrun.yaml").read_text())
    assert content.keys() - {"_target_"} == keys_of(SweepSettings).keys()
