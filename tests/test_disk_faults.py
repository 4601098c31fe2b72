"""Each call on the run's folder fails once: a run ends well, or fails in one line and is repaired by a restart.

By default one call of each kind fails (an operation on a file). With the environment variable ``ALL_DISK_FAULTS=1``
every single call does, which takes some minutes.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import functools
import io
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any

import pytest

from distrain.checkpoint import reader as checkpoint_reader
from distrain.checkpoint import writer as checkpoint_writer
from distrain.cli import app, run_folder
from distrain.config.schema import Config
from distrain.errors import EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED, ConfigError, Failed, Stopped
from distrain.reporting.loggers.tensorboard import TensorBoardLogger
from distrain.runtime.run_owner import RunOwner
from distrain.tasks.base import Evaluation
from distrain.training import callbacks, checkpointing
from distrain.training.callbacks import Callback
from distrain.training.report import Report
from distrain.training.trainer import Trainer
from tests.faulty_disk import Call, FaultyDisk
from tests.harness import run_ranks, run_ranks_to_the_end, soaked
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


ALL_FAULTS = bool(os.environ.get("ALL_DISK_FAULTS"))


def chosen(calls: list[Call], known: Set[str] = frozenset()) -> list[int]:
    """The numbers of the calls that fail: one of each kind but the known ones, by turns the first and the last."""
    if ALL_FAULTS:
        return list(range(len(calls)))
    numbers: dict[str, list[int]] = {}
    for number, call in enumerate(calls):
        numbers.setdefault(kind(call), []).append(number)
    new = [own for name, own in numbers.items() if name not in known]
    return sorted(own[-(turn % 2)] for turn, own in enumerate(new))


def once(number: int, code: int) -> Callable[[int, Call], int]:
    return lambda index, _call: code if index == number else 0


@pytest.fixture(scope="module")
def kinds_of_a_new_run(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    folder = tmp_path_factory.mktemp("new") / "run"
    with FaultyDisk(folder) as disk:
        assert start(folder)[0] == 0
    return {kind(call) for call in disk.calls}


@pytest.mark.timeout(4000 if ALL_FAULTS else 600)
#: A run that is resumed makes nearly all calls of a new one.
@pytest.mark.parametrize(
    "resumes", [False, True] if ALL_FAULTS else soaked([False, True], [True]), ids=["fresh", "resumed"]
)
def test_each_call_on_the_run_folder_may_fail_once(
    resumes: bool, tmp_path: Path, finished: Path, stopped: Path, kinds_of_a_new_run: set[str]
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
    for count, number in enumerate(chosen(disk.calls, kinds_of_a_new_run if resumes else frozenset())):
        prepare()
        with FaultyDisk(folder, once(number, ERRORS[count % len(ERRORS)])) as faulty:
            code, said = start(folder)
        problems = problems_of(folder, finished, resumes, code, said)
        if problems:
            name = errno.errorcode[ERRORS[count % len(ERRORS)]]
            table.append(f"call {number} ({', '.join(map(str, faulty.failed))}: {name}): {problems}\n{said[-1500:]}")
    assert not table, "\n".join([f"{len(table)} faults are not handled:", *table])


# --- a disk that stays full, and one that recovers -------------------------------------------------------------------

WRITES = ("open", "write", "mkdir", "rename", "replace", "fsync", "unlink", "rmdir", "close", "truncate")


class FullFromUntil:
    """Lets everything that writes fail from one call on until another.

    Args:
        first: Text in the call from which on calls fail.
        last: Text in the first call that succeeds again.
        code: Their errno.
    """

    def __init__(self, first: str, last: str, code: int) -> None:
        self._first, self._last, self._code = first, last, code
        self._began = self._ended = False

    def __call__(self, _: int, call: Call) -> int:
        self._began = self._began or self._first in str(call)
        self._ended = self._ended or (self._began and self._last in str(call))
        return self._code if self._began and not self._ended and call.operation in WRITES else 0


#: From which call on a disk fails, until which, and the exit code.
SPANS = {
    "always": ("", "never", EXIT_REFUSED),
    "from the first step": ("write metrics.jsonl", "never", EXIT_FAILED),
    "to the end": ("replace checkpoints/.step_00000001", "never", EXIT_FAILED),
    "for a while": ("write metrics.jsonl", "step_00000003", 0),
    "for a moment": (".step_00000001", "step_00000002", 0),
}
SPANS_AND_ERRORS = list(itertools.product(SPANS, ERRORS))


# In every run of the tests each span with two errors, and each error in two spans.
@pytest.mark.parametrize(
    "case",
    soaked(SPANS_AND_ERRORS, [*SPANS_AND_ERRORS[::6], *SPANS_AND_ERRORS[2:15:6], *SPANS_AND_ERRORS[15::6]]),
    ids=lambda case: f"{case[0]}-{errno.errorcode[case[1]]}",
)
def test_a_disk_that_stays_full_ends_a_run_in_one_line_and_one_that_recovers_does_not(
    case: tuple[str, int], tmp_path: Path, finished: Path
) -> None:
    span, code = case
    first, last, expected = SPANS[span]
    folder = tmp_path / "run"
    with FaultyDisk(folder, FullFromUntil(first, last, code)) as faulty:
        ended, said = start(folder)
    assert faulty.failed
    assert (ended, problems_of(folder, finished, False, ended, said)) == (expected, []), said
    if expected == 0:
        # What was logged while the disk failed is there too.
        assert steps_of_rows(folder) == [1, 2, 3, 3]
        assert "NOT SAVED at step" in (folder / "logs" / "rank_0.log").read_text()


def steps_of_rows(folder: Path) -> list[int]:
    """Steps of the rows of ``metrics.jsonl``."""
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_full_disk_after_the_last_save_costs_only_reports(tmp_path: Path, finished: Path) -> None:
    folder = tmp_path / "run"

    published = f"replace checkpoints/.{Path(LAST).name}"

    def is_full(_: int, call: Call) -> int:
        is_saved = any(str(earlier).startswith(published) for earlier in disk.calls)
        return errno.ENOSPC if is_saved and call.operation in ("open", "write") else 0

    with FaultyDisk(folder, is_full) as disk:
        code, said = start(folder)
    assert disk.failed
    assert (code, problems_of_success(folder, finished)) == (0, [])
    assert not (folder / "summary.json").exists()
    assert said.count("summary.json can't be written") == 1
    assert said.count("can't write its log") == 1
    assert "Traceback" not in said


def _fail_on_one_rank(folder: Path, faulty_rank: int, number: int, code: int) -> tuple[int, str, int]:
    """What a rank of two does whose calls on the folder fail, one of them."""
    checkpointing._LAST_SAVES = (0, 0, 0, 0)
    rank = int(os.environ["RANK"])
    with FaultyDisk(folder, once(number if rank == faulty_rank else -1, code)) as disk:
        code, said = start(folder, 3, "strategy=ddp", "logger=none")
    return code, said, len(disk.failed)


@pytest.mark.parametrize("case", soaked([(0, 40), (0, 160), (1, 12), (1, 30)], [(0, 40), (1, 12)]), ids=str)
def test_a_fault_on_one_of_two_ranks(case: tuple[int, int], tmp_path: Path) -> None:
    rank, number = case
    outcomes = run_ranks_to_the_end(_fail_on_one_rank, 2, tmp_path / "run", rank, number, errno.EIO)
    # While the other rank waits in torch for one that failed, only its watch can end it.
    by_watch = [other for other in range(2) if other != rank and str(outcomes[other]) == "died with exit code 1"]
    endings = [(EXIT_FAILED, "", 0) if place in by_watch else outcome for place, outcome in enumerate(outcomes)]
    codes = {code for code, _, _ in endings}
    assert len(codes) == 1
    assert codes <= {0, EXIT_FAILED, EXIT_REFUSED}
    assert endings[rank][2] == 1
    assert all("Traceback" not in said for _, said, _ in endings)
    again = run_ranks(_fail_on_one_rank, 2, tmp_path / "run", rank, -1, 0)
    assert [code for code, _, _ in again] == [0, 0]
    assert checkpoint_reader.newest_valid(tmp_path / "run" / "checkpoints") == tmp_path / "run" / LAST


# --- a folder that is removed, replaced or taken ---------------------------------------------------------------------


class AtStep(Callback):
    """Does something after a step, once."""

    def __init__(self, step: int, action: Callable[[], object]) -> None:
        self._step, self._action = step, action

    def on_step_end(self, run: Any) -> None:
        if run.progress.step == self._step:
            self._action()


Plan = Callable[[int, Callable[[], object]], None]


@pytest.fixture
def plan_action(monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Plans what happens after a step of the next run."""

    def plan(step: int, action: Callable[[], object]) -> None:
        monkeypatch.setattr(callbacks, "default_callbacks", lambda *_, **__: [AtStep(step, action)])

    return plan


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        remove(path) if path.is_dir() else path.unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Removes a folder, into which another thread may write at that moment."""
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)


def make_anew(folder: Path) -> None:
    remove(folder)
    # The run's own threads may have made it meanwhile.
    folder.mkdir(exist_ok=True)


@pytest.mark.parametrize("background", [False, True], ids=["", "background"])
@pytest.mark.parametrize(
    "remove",
    [
        remove,
        empty,
        lambda folder: remove(folder.parent),
        lambda folder: folder.rename(folder.with_name("moved")),
        lambda folder: remove(folder / "checkpoints"),
        lambda folder: remove(folder / "logs"),
        lambda folder: (folder / "config.yaml").unlink(),
        lambda folder: (folder / "metrics.jsonl").unlink(),
        make_anew,
    ],
    ids=["removed", "emptied", "parent", "moved", "checkpoints", "logs", "config", "metrics", "made anew"],
)
def test_a_folder_that_is_removed_is_written_anew(
    remove: Callable[[Path], object], background: bool, tmp_path: Path, finished: Path, plan_action: Plan
) -> None:
    folder = tmp_path / "parent" / "run"
    plan_action(2, lambda: remove(folder))
    code, said = start(folder, 3, f"checkpoint.background={str(background).lower()}")
    assert (code, problems_of_success(folder, finished)) == (0, []), said
    assert steps_of_rows(folder) == [1, 2, 3, 3]
    assert "run folder: " in (folder / "logs" / "rank_0.log").read_text()
    assert json.loads((folder / "summary.json").read_text())["steps"] == 3
    assert [path.name for path in folder.rglob(".*")] == []


@pytest.mark.parametrize("background", [False, True], ids=["", "background"])
@pytest.mark.parametrize("moment", ["_files_of_rank", "_complete"])
@pytest.mark.parametrize("remove", [remove, make_anew], ids=["removed", "made anew"])
def test_a_folder_that_is_removed_while_a_checkpoint_is_written_is_written_anew(
    remove: Callable[[Path], object],
    moment: str,
    background: bool,
    tmp_path: Path,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "run"
    write, waiting = getattr(checkpoint_writer, moment), [folder]

    def remove_and_write(*arguments: Any) -> Any:
        if waiting:
            remove(waiting.pop())
            if moment == "_complete":
                # A slow disk: the writer has made its hidden folder in the new one.
                (folder / "checkpoints" / arguments[0].name).mkdir(parents=True)
        return write(*arguments)

    monkeypatch.setattr(checkpoint_writer, moment, remove_and_write)
    code, said = start(folder, 3, f"checkpoint.background={str(background).lower()}")
    assert (code, problems_of_success(folder, finished)) == (0, []), said
    assert "CHECKPOINT NOT SAVED at step 1: " in said


def test_a_folder_that_is_removed_after_the_last_step_is_written_anew(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    evaluate = Trainer.evaluate

    def remove_and_evaluate(self: Trainer, split: str, watch: Sequence[int] = ()) -> Evaluation:
        if split == "test":
            shutil.rmtree(folder)
        return evaluate(self, split, watch)

    monkeypatch.setattr(Trainer, "evaluate", remove_and_evaluate)
    code, said = start(folder)
    assert (code, problems_of_success(folder, finished)) == (0, []), said
    assert "THE RUN FOLDER WAS REMOVED" in said


def test_a_folder_that_is_removed_after_the_summary_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    monkeypatch.setattr(Report, "write", lambda *_: shutil.rmtree(folder))
    code, said = start(folder)
    assert code == EXIT_FAILED
    assert said.splitlines()[-1].endswith(f"the run folder {folder} was removed after the last step was saved")


def test_another_folder_in_its_place_is_left_alone(tmp_path: Path, finished: Path, plan_action: Plan) -> None:
    folder = tmp_path / "run"

    def replace() -> None:
        folder.rename(tmp_path / "moved")
        shutil.copytree(finished, folder)

    plan_action(2, replace)
    code, said = start(folder)
    assert code == EXIT_FAILED
    assert f"the run folder {folder} was removed, and another one is in its place" in said.splitlines()[-1]
    assert content_of(folder) == content_of(finished)


def content_of(folder: Path) -> dict[str, bytes]:
    """The files of a run's folder, without those of a checkpoint that is being written or removed."""
    paths = [path for path in folder.rglob("*") if not path.parent.name.startswith(".") and path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def raise_error() -> None:
    raise RuntimeError("a failure of the earlier start")


@pytest.mark.parametrize(
    ("then", "message"),
    [(lambda: None, "another start of this run has taken over"), (raise_error, "a failure of the earlier start")],
    ids=["goes on", "fails"],
)
@pytest.mark.parametrize("background", [False, True], ids=["", "background"])
@pytest.mark.parametrize("saves", [True, False], ids=["saves", "logs only"])
def test_a_start_whose_folder_was_taken_writes_nothing_more(
    then: Callable[[], None], message: str, background: bool, saves: bool, tmp_path: Path, plan_action: Plan
) -> None:
    folder, left = tmp_path / "run", {}

    def take_over() -> None:
        # The later start runs to its end, in a process of its own as far as files go.
        RunOwner.take(folder)
        folder.joinpath("metrics.jsonl").write_text("rows of the later start\n")
        left.update(content_of(folder))
        then()

    plan_action(2, take_over)
    options = [f"checkpoint.background={str(background).lower()}", *([] if saves else ["checkpoint.every_steps=null"])]
    code, said = start(folder, 3, *options)
    assert code == EXIT_FAILED
    assert said.splitlines()[-1].startswith("distrain: rank 0 on ")
    assert message in said.splitlines()[-1]
    assert content_of(folder) == left


def _train_until_taken(folder: Path) -> tuple[int, str, dict[str, bytes]]:
    left: dict[str, bytes] = {}

    def take_over() -> None:
        RunOwner.take(folder)
        left.update(content_of(folder))

    is_main = os.environ["RANK"] == "0"
    setattr(callbacks, "default_callbacks", lambda *_, **__: [AtStep(2, take_over)] if is_main else [])  # noqa: B010
    code, said = start(folder, 3, "strategy=ddp", "logger=none")
    return code, said, left


def test_no_rank_writes_into_a_folder_that_was_taken(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    endings = run_ranks(_train_until_taken, 2, folder)
    assert [code for code, _, _ in endings] == [EXIT_FAILED, EXIT_FAILED]
    assert all("another start of this run has taken over" in said.splitlines()[-1] for _, said, _ in endings)
    assert content_of(folder) == endings[0][2]
