"""Each call on the run's folder fails once: a run ends well, or fails in one line and is repaired by a restart.

By default one call of each kind fails (an operation on a file, the first time and the last time). With the environment
variable ``ALL_DISK_FAULTS=1`` every single call does, which takes some minutes.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import functools
import io
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from distrain.checkpoint import reader as checkpoint_reader
from distrain.cli import app, run_folder
from distrain.config.schema import Config
from distrain.errors import EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED, ConfigError, Failed, Stopped
from distrain.reporting.loggers import TensorBoardLogger
from distrain.training import checkpointing
from tests.faulty_disk import Call, FaultyDisk
from tests.runs import small

ERRORS = (errno.ENOSPC, errno.EIO, errno.ESTALE, errno.EROFS, errno.EDQUOT)
LAST = "checkpoints/step_00000003"
OPTIONS = (
    "model=custom",
    "model._target_=tests.training.test_trainer.DropoutNet",
    "data.train_size=24",
    "data.val_fraction=0.2",
    "data.test_size=5",
    "data.batch_size=8",
    "trainer.epochs=9",
    "trainer.max_steps=3",
    "trainer.log_every_steps=1",
    "trainer.memory_format=contiguous",
    "scheduler=constant",
    "checkpoint.every_steps=1",
    "checkpoint.keep=1",
    "logger=tensorboard",
)


@functools.cache
def composed(*overrides: str) -> Config:
    return small(*OPTIONS, *overrides)


def config_for(folder: Path, max_steps: int, *overrides: str) -> Config:
    """A copy of the configuration, composed once since that takes longer than the run."""
    config = copy.deepcopy(composed("checkpoint.background=false", *overrides))
    config.run_dir, config.trainer.max_steps = str(folder), max_steps
    return config


def start(folder: Path, max_steps: int = 3, *overrides: str) -> tuple[int, str]:
    """Trains as ``launch/train.py`` would; returns the exit code and what was said on the terminal."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            app.train(config_for(folder, max_steps, *overrides))
            code = 0
        except ConfigError as error:
            print(f"distrain: {error}", file=sys.stderr)
            code = EXIT_REFUSED
        except Failed:
            code = EXIT_FAILED
        except Stopped:
            code = EXIT_STOPPED
    return code, said.getvalue()


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither figures nor pauses between attempts to save."""
    monkeypatch.setattr(TensorBoardLogger, "accepts_figures", False)
    monkeypatch.setattr(checkpointing, "_LAST_SAVES", (0, 0, 0, 0))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert start(folder)[0] == 0
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has two steps behind it."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    assert start(folder, 2)[0] == 0
    return folder


def tensors(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / LAST).glob("*.safetensors"))}


def problems_of_success(folder: Path, finished: Path) -> list[str]:
    """What is wrong with the folder of a run that ended with exit code 0."""
    try:
        # As `evaluate` reads it.
        run = run_folder.RunFolder.open(str(folder), allow=("tests",))
        assert run.weights("newest").step == 3
    except Exception as error:
        return [f"evaluate can't read the folder: {error!r}"]
    return [] if tensors(folder) == tensors(finished) else ["the parameters differ"]


def problems_of(folder: Path, finished: Path, had_checkpoint: bool, code: int, said: str) -> list[str]:
    """What is wrong with a run on a faulty disk, and with the restart after it."""
    problems = [f"{word!r} on the terminal" for word in ("Traceback", "Exception ignored") if word in said]
    failures = [line for line in said.splitlines() if re.match(r"distrain: (rank \d+ on \S+ failed|\w+=)", line)]
    if code == 0:
        problems += problems_of_success(folder, finished)
    elif code not in (EXIT_FAILED, EXIT_REFUSED) or len(failures) != 1:
        problems.append(f"exit code {code}, {len(failures)} lines of failure")
    if had_checkpoint and checkpoint_reader.newest_valid(folder / "checkpoints") is None:
        problems.append("the good checkpoint is lost")
    again, said_again = start(folder)
    if again or "Traceback" in said_again:
        return [*problems, f"the restart ends with {again}: {said_again[-500:]}"]
    return problems + [f"after the restart: {problem}" for problem in problems_of_success(folder, finished)]


def kind(call: Call) -> str:
    """An operation on a file, without what differs between steps, starts and processes."""
    return re.sub(r"\d+", "N", str(call))


def chosen(calls: list[Call]) -> list[int]:
    """The numbers of the calls that fail: the first and the last one of each kind."""
    if os.environ.get("ALL_DISK_FAULTS"):
        return list(range(len(calls)))
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for number, call in enumerate(calls):
        first.setdefault(kind(call), number)
        last[kind(call)] = number
    return sorted({*first.values(), *last.values()})


def once(number: int, code: int) -> Callable[[int, Call], int]:
    return lambda index, _call: code if index == number else 0


@pytest.mark.parametrize("resumes", [False, True], ids=["fresh", "resumed"])
def test_each_call_on_the_run_folder_may_fail_once(
    resumes: bool, tmp_path: Path, finished: Path, stopped: Path
) -> None:
    folder = tmp_path / "run"

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        if resumes:
            shutil.copytree(stopped, folder)

    prepare()
    with FaultyDisk(folder) as disk:
        assert start(folder)[0] == 0
    assert len(disk.calls) > 200
    table: list[str] = []
    for count, number in enumerate(chosen(disk.calls)):
        prepare()
        with FaultyDisk(folder, once(number, ERRORS[count % len(ERRORS)])) as faulty:
            code, said = start(folder)
        problems = problems_of(folder, finished, resumes, code, said)
        if problems:
            name = errno.errorcode[ERRORS[count % len(ERRORS)]]
            table.append(f"call {number} ({', '.join(map(str, faulty.failed))}: {name}): {problems}\n{said[-1500:]}")
    assert not table, "\n".join([f"{len(table)} faults are not handled:", *table])
