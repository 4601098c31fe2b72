"""How the command line of a sweep is translated into Hydra's."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from distrain.cli import sweep
from distrain.cli.sweep import SweepSettings
from distrain.errors import ConfigError
from tests.config.test_conf import keys_of
from tests.runs import CONF


def test_nproc_and_sweep_keys_go_to_the_launcher_and_the_rest_to_the_trainings() -> None:
    arguments = ["strategy=ddp", "nproc=2", "sweep.minutes=3", "sweep.folder=there", "compression=none,fp16"]
    assert sweep.multirun_arguments(arguments, Path("/d/it's/train.py"), "here") == [
        "--multirun",
        "hydra/launcher=torchrun",
        "hydra.launcher.script='/d/it\\'s/train.py'",
        "hydra.sweep.dir='here'",
        "strategy=ddp",
        "hydra.launcher.nproc=2",
        "hydra.launcher.minutes=3",
        "hydra.sweep.dir=there",
        "compression=none,fp16",
    ]


def test_unknown_key_of_a_sweep_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^sweep.minuts: no such key; .*did you mean sweep.minutes"):
        sweep.multirun_arguments(["sweep.minuts=3"], Path("train.py"), "here")


def test_launchers_file_has_each_key_of_its_schema() -> None:
    content = yaml.safe_load((CONF / "hydra" / "launcher" / "torchrun.yaml").read_text())
    assert content.keys() - {"_target_"} == keys_of(SweepSettings).keys()
