"""A run imports only what it uses before its first step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import HANG_SECONDS
from tests.runs import LAUNCH

#: Modules that take 0.1 s or more to import; those of the compiler take 0.5 s each.
HEAVY = {
    "matplotlib",
    "PIL",
    "scipy",
    "sklearn",
    "sympy",
    "tensorboard",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.pipelining",
    "torch.distributed.tensor",
}
#: Runs launch/train.py, ends after its first step and prints the names of all imported modules.
TO_FIRST_STEP = """
import json, os, runpy, sys
from distrain.training.trainer import Trainer

def end(trainer):
    assert trainer.progress.step == 1
    print(json.dumps(sorted(sys.modules)), flush=True)
    os._exit(0)

Trainer._agree = end
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""
#: Runs the script that follows on the command line and prints whether it imported torch.
TORCH_IMPORTED = """
import runpy, sys

try:
    runpy.run_path(sys.argv.pop(1), run_name="__main__")
finally:
    print("imported torch:", "torch" in sys.modules)
"""


def started(folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, str(LAUNCH / "train.py"), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(LAUNCH.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )


@pytest.mark.parametrize("strategy", ["single", "ddp"])
def test_first_step_imports_nothing_slow_and_no_other_choice(strategy: str, tmp_path: Path) -> None:
    run = started(tmp_path, TO_FIRST_STEP, f"strategy={strategy}", "logger=tensorboard", "run_dir=run")
    assert run.returncode == 0, run.stderr
    modules = set(json.loads(run.stdout))
    assert {"torch", f"distrain.strategies.{strategy}", "distrain.compression.none"} <= modules
    assert not modules & HEAVY
    others = {
        "distrain.strategies.pipeline.strategy",
        "distrain.strategies.parameter_server.strategy",
        "distrain.compression.powersgd",
    }
    assert not modules & {*others, "distrain.data.cifar10", "distrain.data.image_folder"}


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("optimizer=sgdd", 2), ("trainer.epochs=0", 2)])
def test_help_and_simple_errors_do_not_import_torch(argument: str, code: int, tmp_path: Path) -> None:
    run = started(tmp_path, TORCH_IMPORTED, argument)
    assert run.returncode == code
    assert run.stdout.endswith("imported torch: False\n")


@pytest.mark.parametrize("installed", [True, False])
def test_another_folder_called_distrain_hides_nothing(installed: bool, tmp_path: Path) -> None:
    """A parent of a checkout on PYTHONPATH makes a namespace package of it, with or without an installed distrain."""
    tmp_path.joinpath("distrain", "docs").mkdir(parents=True)
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    run = subprocess.run(
        # -S leaves out what is installed in another way than as a folder of the path.
        [sys.executable, *([] if installed else ["-S"]), str(LAUNCH / "train.py"), "strategy=dpp"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *libraries])},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
    assert "did you mean ddp?" in run.stderr


def test_choice_is_found_in_the_module_named_after_it_or_in_another(tmp_path: Path) -> None:
    """``none`` is in ``none.py``; ``resnet18`` and ``custom`` are in other modules, and no further one is imported."""
    script = (
        "import sys; from distrain.config.registry import choice; "
        "print(choice('compression', 'none').target.__module__, choice('model', 'resnet18').target.__module__, "
        "choice('model', 'custom').schema.__module__, 'distrain.compression.topk' in sys.modules)"
    )
    run = started(tmp_path, script)
    assert run.stdout.split() == [
        "distrain.compression.none",
        "distrain.models.resnet",
        "distrain.models.build",
        "False",
    ]
