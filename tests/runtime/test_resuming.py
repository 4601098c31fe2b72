"""The command with which a stopped run goes on, from the one that started it."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from distrain.runtime.resuming import command_of, how_to_resume

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none"}
PYTHON = ["/usr/bin/python3", "/opt/bin/torchrun"]


@pytest.mark.parametrize(
    ("arguments", "prefix", "environment", "expected"),
    [
        ("train.py lr=1", "python", {}, "to go on: python train.py lr=1 run_dir=runs/x"),
        ("train.py lr=1", "python -W ignore", {}, "to go on: python -W ignore train.py lr=1 run_dir=runs/x"),
        ("train.py run_dir=runs/x lr=1", "python", {}, "to go on: python train.py run_dir=runs/x lr=1"),
        ("train.py run_dir=runs/x resume=never", "python", {}, "to go on: python train.py run_dir=runs/x"),
        ("train.py resume=/other/step_1", "python", {}, "to go on: python train.py run_dir=runs/x"),
        ("train.py 'a=[1, 2]'", "python", {}, "to go on: python train.py 'a=[1, 2]' run_dir=runs/x"),
        ("train.py lr=1,2 -m", "python", {}, "to go on, start this run alone, with run_dir=runs/x"),
        (
            "train.py lr=1",
            "python",
            {"WORLD_SIZE": "2"},
            "to go on, start all ranks as before with run_dir=runs/x",
        ),
        (
            "train.py lr=1",
            "/usr/bin/python3 /opt/bin/torchrun --nproc-per-node 2",
            TORCHRUN,
            "to go on: /opt/bin/torchrun --nproc-per-node 2 train.py lr=1 run_dir=runs/x",
        ),
        (
            "train.py lr=1",
            "python -m torch.distributed.run --nproc-per-node=2",
            TORCHRUN,
            "to go on: python -m torch.distributed.run --nproc-per-node=2 train.py lr=1 run_dir=runs/x",
        ),
        (
            "train.py lr=1",
            "python -m torch.distributed.run --nnodes=2",
            {**TORCHRUN, "GROUP_WORLD_SIZE": "2"},
            "to go on, on every host with its own options: "
            "python -m torch.distributed.run --nnodes=2 train.py lr=1 run_dir=runs/x",
        ),
    ],
)
def test_the_command_is_the_one_that_was_typed_with_the_runs_folder(
    arguments: str, prefix: str, environment: dict[str, str], expected: str
) -> None:
    words, before = shlex.split(arguments), shlex.split(prefix)
    own = ["python", "-u", *words] if "TORCHELASTIC_RUN_ID" in environment else [*before, *words]
    assert how_to_resume(Path("runs/x"), own, [*before, *words], len(words), environment) == expected


def test_a_launcher_whose_command_is_unknown_is_not_guessed() -> None:
    text = how_to_resume(Path("runs/x"), ["python", "train.py"], [], 1, TORCHRUN)
    assert text == "to go on, start all ranks as before with run_dir=runs/x"


def test_the_command_of_a_process_is_read() -> None:
    assert command_of(os.getpid())
    assert command_of(2**22 + 1) == []
