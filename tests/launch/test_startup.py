"""A start imports what it uses: the first step doesn't wait for what another run would need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import LAUNCH

#: Each takes a tenth of a second or more to import, the compiler and what belongs to it half a second each.
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
#: Runs launch/train.py and ends after its first step, with the names of all modules.
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
#: Prints whether what follows on the command line imported torch.
THEN_LOOK = """
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
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("strategy", ["single", "ddp"])
def test_first_step_needs_no_heavy_import_and_no_file_of_another_choice(strategy: str, tmp_path: Path) -> None:
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


@pytest.mark.parametrize(("typed", "code"), [("--help", 0), ("optimizer=sgdd", 2), ("trainer.epochs=0", 2)])
def test_help_and_simple_mistakes_do_not_wait_for_torch(typed: str, code: int, tmp_path: Path) -> None:
    run = started(tmp_path, THEN_LOOK, typed)
    assert run.returncode == code
    assert run.stdout.endswith("imported torch: False\n")


def test_a_choice_is_found_in_the_file_named_after_it_or_in_another(tmp_path: Path) -> None:
    """``none`` lies in ``none.py``, ``resnet18`` and ``custom`` lie elsewhere; both are found, and nothing else is."""
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
